"""Small files that would take gigabytes: what reads them refuses them by name, or takes no more than 2 GB.

`BOMBS` has what makes each file and what reads it. All are read in one process, which measures itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptfast.errors import UserError
from tests.hostile import HEADROOM, little_memory
from train.documents import Documents
from train.tasks import TASKS, Where

ROOT = Path(__file__).parents[1]


class Bomb(NamedTuple):
    make: Callable[[Path], None]  # fills a folder
    read: Callable[[Path], Any]
    said: str = ""  # by the error, which names the file; empty: it is read


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
    parquet(folder / "gsm8k" / "test.parquet", {"question": listed(bits(2**26)), "answer": ["1"]})


def make_few_values(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {"question": listed(bits(2**24)), "answer": ["1"]})


def make_columns(folder: Path) -> None:
    parquet(folder / "gsm8k" / "test.parquet", {f"{i}": ["x"] for i in range(1500)})


def make_rows_of_nothing(folder: Path) -> None:
    import pyarrow

    parquet(folder / "gsm8k" / "test.parquet", {"question": pyarrow.nulls(2**25)})


def read_documents(folder: Path) -> None:
    documents = Documents.find(str(folder / "a.parquet"))
    documents.count()
    for texts, _ in islice(documents.read(), 3):
        assert sum(map(len, filter(None, texts))) <= 2**26


def read_rows(folder: Path) -> None:
    examples = TASKS["gsm8k"].examples("test", Where(str(folder)))
    for i in range(min(3, len(examples))):
        assert examples[i].messages


BOMBS = {
    "long documents": Bomb(make_long_documents, read_documents),
    "a page": Bomb(make_a_page, read_documents, "a.parquet cannot be read (ValueError: pages of it unpack to"),
    "rows": Bomb(make_rows, read_rows),
    "rows in full": Bomb(make_rows_in_full, read_rows, "test.parquet (it unpacks to more than"),
    "a list": Bomb(make_a_list, read_rows, "test.parquet (up to 64 rows of it have 4,294,967,301 bytes"),
    "values": Bomb(make_values, read_rows, "test.parquet (question.list.element has 67,108,864 values in a row group"),
    "few values": Bomb(make_few_values, read_rows, "test.parquet (up to 64 rows of it have 16,777,218 values"),
    "columns": Bomb(make_columns, read_rows, "test.parquet (it has 1,500 columns"),
    "rows of nothing": Bomb(make_rows_of_nothing, read_rows, "test.parquet (it has 33,554,432 rows"),
}


# ---- measured


def status(name: str) -> int:
    """Bytes that /proc/self/status states."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path) -> dict[str, tuple[str, int]]:
    """Reads all bombs in this process: what each said, and by how many bytes the process grew meanwhile."""
    results = {}
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
        results[name] = (said, status("VmHWM") - before)
    return results


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
    assert grown < HEADROOM, f"{name} took {grown:,} bytes"


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
