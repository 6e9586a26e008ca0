"""Small files that would take gigabytes: what reads them refuses them by name, or takes no more than 2 GB.

`BOMBS` has what makes each file and what reads it. All are read in one process, which measures itself.
"""

from __future__ import annotations

import gc
import gzip
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench import deep, history, results
from gptfast import checkpoint, hf, report, untrusted
from gptfast.errors import UserError
from gptfast.tokenizer import load_bpe
from gptfast.untrusted import LARGEST_ROWS
from tests.hostile import HEADROOM, little_memory, signed
from tests.test_hf_nanochat import saved, tensors
from tests.test_hostile import OPS as REFERENCE
from tests.test_hostile import TALK, model
from tests.test_hostile_rows import OPS, write
from tests.test_hostile_sources import load_bundle, make_bundle
from train import core
from train.documents import Documents
from train.tasks import TASKS, Where, find
from train.tasks.words import words

ROOT = Path(__file__).parents[1]


class Bomb(NamedTuple):
    make: Callable[[Path], None]  # fills a folder
    read: Callable[[Path], Any]
    said: str = ""  # by the error, which names the file; empty: it is read
    most: int = HEADROOM  # bytes that it takes


# ---- parquet


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "write_statistics": False}
    parquet.write_table(pyarrow.table(columns), path, **settings | options)


def repeated(size: int, count: int) -> Any:
    """One text of `size` bytes, `count` times."""
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, "int32"), ["x" * size])


def listed(values: Any) -> Any:
    """One row with all the values in a list."""
    import pyarrow

    return pyarrow.ListArray.from_arrays([0, len(values)], values)


def bits(count: int) -> Any:
    import pyarrow

    return pyarrow.BooleanArray.from_buffers(pyarrow.bool_(), count, [None, pyarrow.py_buffer(bytes(count // 8 + 1))])


def make_long_documents(folder: Path) -> None:
    """Of which pyarrow would decode 64 at once: 4 GB."""
    parquet(folder / "a.parquet", {"text": repeated(60 * 2**20, 70)})


def make_a_page(folder: Path) -> None:
    parquet(folder / "a.parquet", {"text": ["x" * 2**27]}, use_dictionary=False)


def make_rows(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {"question": repeated(2**20, 4096), "answer": repeated(1, 4096)})


def make_rows_in_full(folder: Path) -> None:
    columns = {"question": repeated(2**20, 4096), "answer": repeated(1, 4096)}
    parquet(folder / "gsm8k" / "test.parquet", columns, store_schema=False)


def make_a_list(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {"question": listed(repeated(2**20, 4096)), "answer": ["1"]})


def make_values(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {"question": listed(bits(2**25 + 8)), "answer": ["1"]})


def make_few_values(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {"question": listed(bits(2**24)), "answer": ["1"]})


def make_columns(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {f"{i}": ["x"] for i in range(1500)})


def make_rows_of_nothing(folder: Path) -> None:
    import pyarrow

    parquet(folder / "gsm8k" / "test.parquet", {"question": pyarrow.nulls(2**25)})


def read_documents(folder: Path) -> None:
    (path,) = folder.iterdir()
    documents = Documents.find(str(path))
    documents.count()
    for texts, _ in islice(documents.read(), 3):
        assert sum(map(len, filter(None, texts))) <= 2**26


def read_rows(folder: Path) -> None:
    examples = TASKS["gsm8k"].examples("test", Where(str(folder)))
    for i in range(min(3, len(examples))):
        assert examples[i].messages


# ---- JSON and others


def make_settings(folder: Path) -> None:
    """State of an optimizer, which is held twice while it is read."""
    at = checkpoint.save(folder, step=1, model={"w": torch.ones(2)}, optimizer={}, meta={})
    (at / "optimizer.json").write_text('{"":[' + '{"":[]},' * 6_000_000 + "0]}")
    signed(folder)


def make_manifest(folder: Path) -> None:
    """Of which each value is a line that is indented by its depth."""
    at = checkpoint.save(folder, step=1, model={"w": torch.ones(2)}, optimizer={}, meta={})
    deep = "[" * 900 + "1," * 4_000_000 + "1" + "]" * 900
    (at / "manifest.json").write_text(f'{{"format": 2, "sha256": "", "x": {deep}}}')


def make_short_lines(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("[]\n" * (LARGEST_ROWS // 3))


def make_task_rows(folder: Path) -> None:
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "test.jsonl").write_text(("[" + '{"":[]},' * 2**17 + "0]\n") * 12)


def make_long_lines(folder: Path) -> None:
    line = gzip.compress(json.dumps({"text": "x" * 45_000_000}).encode() + b"\n", 1)
    (folder / "a.jsonl.gz").write_bytes(line * 64)


def make_ranks(folder: Path) -> None:
    (folder / "encoding.json").write_text("{}")
    (folder / "ranks.tiktoken").write_text("AA== 1\n" * 7_000_000)


def make_names(folder: Path) -> None:
    """A safetensors file of many tensors without elements."""
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{i}":{empty}' for i in range(700_000)) + "}").encode()
    hf.save(model(), folder)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def make_expanded(folder: Path) -> None:
    """A state dict whose tensors have one element each, repeated."""
    names = tensors(saved(folder))
    saved(folder, {name: torch.zeros(1).expand(10**5, 10**5) for name in names})


def make_packed_weights(folder: Path) -> None:
    saved(folder)
    with zipfile.ZipFile(folder / "model_000007.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("model/data.pkl", b"]" * 2**26)


def make_aliases(folder: Path) -> None:
    """YAML in which each name stands for ten of the one before."""
    make_bundle(folder)
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    (folder / "core.yaml").write_text("\n".join(lines))


def make_table(folder: Path) -> None:
    """Each row of a table has as many cells as its first line has names."""
    make_bundle(folder)
    (folder / "eval_meta_data.csv").write_text("a," * 10_000 + "\n" + "1\n" * 10_000)


def make_words(folder: Path) -> None:
    (folder / "words.txt").write_text("ab " * 40_000_000)


def make_launches(folder: Path) -> None:
    (folder / "report.csv").write_text('"ID","Kernel Name"\n' + ",\n" * 4_000_000)


def read_short_lines(folder: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not a row"):
        report.read([folder / "rows.jsonl"])
    results.read(folder / "rows.jsonl")


def load_checkpoint(folder: Path) -> None:
    checkpoint.load(folder)


def load_export(folder: Path) -> None:
    hf.load(folder, REFERENCE)


BOMBS = {
    "long documents": Bomb(make_long_documents, read_documents),
    "a page": Bomb(make_a_page, read_documents, "a.parquet cannot be read (ValueError: pages of it unpack to"),
    "rows": Bomb(make_rows, read_rows),
    "rows in full": Bomb(make_rows_in_full, read_rows, "test.parquet (it unpacks to more than"),
    "a list": Bomb(make_a_list, read_rows, "test.parquet (up to 64 rows of it have 4,294,967,301 bytes"),
    "values": Bomb(make_values, read_rows, "test.parquet (question.list.element has 33,554,440 values in a row group"),
    "few values": Bomb(make_few_values, read_rows, "test.parquet (up to 64 rows of it have 16,777,218 values"),
    "columns": Bomb(make_columns, read_rows, "test.parquet (it has 1,500 columns"),
    "rows of nothing": Bomb(make_rows_of_nothing, read_rows, "test.parquet (it has 33,554,432 rows"),
    "settings": Bomb(make_settings, load_checkpoint, "it has more than 4,194,304 values"),
    "manifest": Bomb(make_manifest, load_checkpoint, "manifest.json is altered"),
    "short lines": Bomb(make_short_lines, read_short_lines, "rows.jsonl:1: a row is a JSON object"),
    "task rows": Bomb(make_task_rows, read_rows, "row 0 of the task's data is not as", 2**28),
    "long lines": Bomb(make_long_lines, read_documents),
    "ranks": Bomb(make_ranks, load_bpe, "ranks.tiktoken (it has more than 1,048,576 tokens"),
    "names": Bomb(make_names, load_export, "model.safetensors is damaged (it is no safetensors file, or has more than"),
    "expanded": Bomb(make_expanded, load_export, "model_000007.pt has tensors of"),
    "packed weights": Bomb(make_packed_weights, load_export, "model_000007.pt has "),
    "aliases": Bomb(make_aliases, load_bundle, "core.yaml: it has aliases"),
    "a table": Bomb(make_table, load_bundle, "eval_meta_data.csv: no table of"),
    "words": Bomb(make_words, lambda folder: words(Where(str(folder))), "words.txt (it has 120,000,000 bytes"),
    "launches": Bomb(make_launches, lambda at: deep.read_report(at / "report.csv"), "has more than 131,072 launches"),
}


# ---- measured


def status(name: str) -> int:
    """Bytes that /proc/self/status states."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path) -> dict[str, tuple[str, int]]:
    """Reads all bombs in this process: what each said, and by how many bytes the process grew meanwhile."""
    measured = {}
    gc.collect()
    gc.freeze()  # or parsing looks through all modules again and again
    for name, bomb in BOMBS.items():
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        said = ""
        try:
            with little_memory():
                bomb.read(folder / name)
        except UserError as error:
            said = str(error)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        measured[name] = (said, status("VmHWM") - before)
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, bomb in BOMBS.items():
        (folder / name).mkdir()
        bomb.make(folder / name)
    command = [sys.executable, "-m", "tests.test_hostile_memory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_no_gigabytes(name: str, measured: dict[str, tuple[str, int]]) -> None:
    said, grown = measured[name]
    assert BOMBS[name].said in said and bool(said) == bool(BOMBS[name].said)
    assert grown < BOMBS[name].most, f"{name} took {grown:,} bytes"


# ---- what is held together


@pytest.mark.parametrize("limit", ["LARGEST_ROWS", "MOST_ROW_MARKS"])
def test_files_of_rows_are_bounded_together(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", OPS[:1])
    write(tmp_path / "b.jsonl", OPS[:1])
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    line = paths[0].read_bytes()
    (tmp_path / "journal").write_bytes(line * 2)
    most = len(line) if limit == "LARGEST_ROWS" else untrusted.marks(line)
    monkeypatch.setattr(untrusted, limit, most + 1)
    assert len(report.read(paths[:1])) == len(results.read_all(paths[:1])) == 1
    cases = {
        "b.jsonl": [lambda: report.read(paths), lambda: results.read_all([tmp_path])],
        "journal": [lambda: core.Journal(tmp_path / "journal")],
    }
    for name, reads in cases.items():
        for read in reads:
            with pytest.raises(UserError, match=rf"{name}.*with what was read before, it has more than {most + 1:,}"):
                read()


def test_rows_of_all_commits_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for number in range(3):
        write(tmp_path / "ops.jsonl", [row | {"date": f"2026-01-0{number + 1}T00:00:00+00:00"} for row in OPS[:2]])
        commands = [["init", "-q"], ["add", "."], ["commit", "-qm", "rows"]]
        for command in commands[number > 0 :]:
            subprocess.run([*git, *command], check=True)
    size = (tmp_path / "ops.jsonl").stat().st_size
    assert len(history.through_git(tmp_path)) == 6
    monkeypatch.setattr(untrusted, "LARGEST_ROWS", 2 * size)
    with pytest.raises(UserError, match="the rows of all commits are too many"):
        history.through_git(tmp_path)
    monkeypatch.setattr(untrusted, "LARGEST_ROWS", size - 1)
    assert history._git(tmp_path, "show", "HEAD:ops.jsonl") is None


def test_conversations_of_a_task_stay_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text((json.dumps({"messages": TALK * 100}) + "\n") * 200)
    tracemalloc.start()
    try:
        examples = find(f"jsonl:{path}").examples("train", Where())
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 10 * held
    assert len(examples) == 200 and examples[199].messages == TALK * 100
    path.unlink()  # as the file stays open
    assert examples[-1] == examples[0]


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
