"""Parquet files are read as pyarrow reads them, however they are written, and damaged ones are refused."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet as theirs

from gptfast.untrusted import STRANGE
from train import parquet

TABLE: dict[str, Any] = {
    "text": ["p", "q", None, "pq"],
    "coded": pyarrow.array(["a", "b", "a", None]).dictionary_encode(),
    "number": [1, 2, 3, None],
    "nothing": [None] * 4,
    "bytes": [b"x", None, b"", b"yy"],
    "names": [["a", "b"], [], None, [None]],
    "long": pyarrow.array([["x"], None, [], ["y"]], pyarrow.large_list(pyarrow.large_string())),
    "within": [{"t": ["q"]}, None, {"t": None}, None],
    "pairs": pyarrow.array([[("k", "v")], None, [], []], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    "messages": [[{"role": "user", "content": "h\u00e9"}, {"role": "a", "content": None}], None, [], []],
}


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zstd", "row_group_size": 2}, {"data_page_version": "2.0", "compression": "gzip"},
     {"use_dictionary": False, "compression": "none"}, {"store_schema": False, "data_page_size": 1},
     {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "bytes": "DELTA_LENGTH_BYTE_ARRAY"}}],
    ids=str,
)  # fmt: skip
def test_what_is_read_is_what_pyarrow_reads(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    theirs.write_table(pyarrow.table(TABLE), path, **options)
    rows = theirs.read_table(path).to_pylist()
    ours = parquet.table(path)
    assert list(ours) == rows and ours[-1] == rows[-1] and ours[1:3] == rows[1:3] and parquet.count(path) == 4
    for name in TABLE:
        if name in ("text", "coded", "number", "nothing", "bytes"):
            assert list(parquet.cells(path, name, 1)) == [(row[name], i) for i, row in enumerate(rows)][1:]
        else:
            with pytest.raises(ValueError, match=rf"{name} is no text but (large_)?(list|struct|map)<"):
                list(parquet.cells(path, name))
    with pytest.raises(parquet.NoColumn, match="text, coded, number"):
        list(parquet.cells(path, "words"))


def test_values_that_repeat_the_one_before_are_decoded_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page holds a long value once, and 99 times that the next is the same."""
    path, value = tmp_path / "a.parquet", "x" * 10_000
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none", "data_page_size": 2**30}
    theirs.write_table(pyarrow.table({"text": [value] * 99}), path, column_encoding="DELTA_BYTE_ARRAY", **options)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(parquet, "BATCH_BYTES", 30_000)
    sizes = []
    read = theirs.ParquetFile.iter_batches
    monkeypatch.setattr(theirs.ParquetFile, "iter_batches", lambda f, size, *a: sizes.append(size) or read(f, size, *a))
    assert list(parquet.cells(path, "text")) == [(value, i) for i in range(99)]
    assert sizes == [2]
    theirs.write_table(pyarrow.table({"text": [[value] * 99]}), path, column_encoding="DELTA_BYTE_ARRAY", **options)
    with pytest.raises(ValueError, match=r"text\.list\.element can unpack to"):
        parquet.table(path)


def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    theirs.write_table(pyarrow.table({"text": ["words"] * 9}), path, use_dictionary=False, compression="none")
    content = path.read_bytes()
    for at, said in ((4, "header of a page is damaged|no page at byte 4"), (len(content) - 1, "does not end as")):
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        with pytest.raises(ValueError, match=said):
            parquet.table(path)
    path.write_bytes(content[:-8] + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(ValueError, match="its footer has 2,147,483,647 bytes"):
        parquet.table(path)


def damage(path: Path, count: int) -> None:
    """Reads a file `count` times with a few other bits; prints how often it was read, and how often refused."""
    theirs.write_table(pyarrow.table(TABLE), path, compression="zstd")
    content, draw = path.read_bytes(), random.Random(0)
    verdicts = {"read": 0, "refused": 0}
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        for read in (lambda: list(parquet.table(path)), lambda: list(parquet.cells(path, "text"))):
            try:
                read()
                verdicts["read"] += 1
            except (OSError, *STRANGE, parquet.NoColumn):
                verdicts["refused"] += 1
    print(verdicts)


def test_no_damage_ends_the_process(tmp_path: Path, chaos: Callable[[int, int], int]) -> None:
    """As that of some statistics does where pyarrow's objects for chunks are asked for."""
    count = chaos(300, 5000)
    command = [sys.executable, "-m", "tests.test_parquet", str(tmp_path / "a.parquet"), str(count)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    verdicts = ast.literal_eval(done.stdout)
    assert sum(verdicts.values()) == 2 * count and min(verdicts.values()) > count // 10


if __name__ == "__main__":
    damage(Path(sys.argv[1]), int(sys.argv[2]))
