"""No reader of files is left out of the hostile-file tests: what the code reads is compared with what they attack."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import readers
from tests.hostile import Loader, attacks
from tests.test_hostile import LOADERS
from tests.test_hostile_rows import READERS
from tests.test_hostile_sources import SLOW, SOURCES

ALL = [*LOADERS, *SOURCES, *SLOW, *READERS]


def test_every_reader_of_files_is_attacked() -> None:
    missing = readers.unattacked(ALL, readers.found())
    assert not missing, "\n".join(missing)


def test_the_lists_name_readers_that_are_there() -> None:
    """Also of what is attacked: `attacks` runs each loader and sees that its files come to what it names."""
    listed = {name for loader in ALL for name in loader.reads}
    assert not (listed | set(readers.OURS)) - set(readers.found())
    assert not listed & set(readers.OURS)


@pytest.mark.parametrize(
    "line",
    ["json.loads(path.read_bytes())", "json.load(file)", "open(path)", "open(path, 'rb')", "path.open()",
     "path.open('r+b')", "os.open(path, os.O_RDONLY)", "np.memmap(path)", "torch.load(path, weights_only=True)",
     "safe_open(path, 'pt')", "safetensors.torch.load_file(path)", "parquet.read_table(path)", "gzip.decompress(x)",
     "untrusted.json_object(path, 'mend it')", "untrusted.rows(path, allowance)", "text_of(path)",
     "zipfile.ZipFile(path)", "AutoTokenizer.from_pretrained(path)", "datasets.load_dataset('json')",
     "csv.DictReader(x)", "yaml.safe_load(x)"],
)  # fmt: skip
def test_a_new_reader_is_seen(line: str) -> None:
    source = "from gptfast.untrusted import text as text_of\n\nclass A:\n    def f(self, path):\n        return "
    name = "gptfast/new.py:A.f"
    assert [found for found, _ in readers.of("gptfast/new.py", source + line)] == [name]
    (said,) = readers.unattacked(ALL, [name])
    assert said.startswith(f"{name} reads files") and "`reads`" in said and "OURS" in said


@pytest.mark.parametrize(
    "line", ["path.open('w')", "open(path, 'ab')", "os.open(path, os.O_WRONLY)", "json.dumps(x)", "path.write_text(x)"]
)
def test_what_reads_nothing_is_passed_over(line: str) -> None:
    assert not list(readers.of("gptfast/new.py", line))


def test_a_loader_that_does_not_lead_where_it_says_is_seen(tmp_path: Path) -> None:
    name = "gptfast/tokenizer.py:load_bpe"
    loader = Loader("text", lambda folder: (folder / "a").touch(), lambda folder: (folder / "a").stat(), reads=(name,))
    with pytest.raises(AssertionError, match=f"the files of text do not come to {name}"):
        attacks(loader, tmp_path, 1)
