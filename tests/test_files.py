"""Files of documents: every odd one is read, left out or refused by name, and mending one costs nothing read before."""

from __future__ import annotations

import bz2
import datetime
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from gptfast.data import load_tokens, parts_of
from gptfast.errors import UserError
from gptfast.tokenizer import BPETokenizer
from train import documents as stream
from train.documents import Documents, Shape, make_shards
from train.prepare import PrepareConfig, prepare_as

BYTES = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {"<|bos|>": 256})


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH", 4)


def lines(*texts: Any, column: str = "text") -> str:
    return "".join(json.dumps({column: each}) + "\n" for each in texts)


def texts_of(source: Path, **more: Any) -> list[str | None]:
    return [text for batch, _ in Documents.find(str(source), **more).read() for text in batch]


def made(source: Path, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The documents of a data set, val's first, and its meta.json."""
    meta = make_shards(folder, Documents.find(str(source)), BYTES, Shape(0.5, 10**6))
    ids = [
        token
        for split in ("val", "train")
        for part in parts_of(load_tokens(folder / f"{split}.bin", 257))
        for token in part.tolist()
    ]
    pieces: list[list[int]] = []
    for token in ids:
        pieces.append([]) if token == 256 else pieces[-1].append(token)
    return [bytes(piece).decode() for piece in pieces], meta


def test_names_are_names_and_no_patterns(tmp_path: Path) -> None:
    for folder in ("a*b", "a-b"):
        (tmp_path / folder).mkdir()
        for name in ("a.jsonl", "b[1].jsonl", "c?.jsonl", "d{1,2}.jsonl"):
            (tmp_path / folder / name).write_text(lines(f"{folder} {name}"))
    assert texts_of(tmp_path / "a*b") == [
        f"a*b {name}" for name in ("a.jsonl", "b[1].jsonl", "c?.jsonl", "d{1,2}.jsonl")
    ]
    assert texts_of(tmp_path / "a*b" / "b[1].jsonl") == ["a*b b[1].jsonl"]


def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "folder.txt").mkdir()
    for name in (".ipynb_checkpoints/A.TXT", "._A.TXT", "README.md", "LICENSE", "notes.doc", "A.TXT", "b.txt"):
        (tmp_path / name).write_text(f"of {name}")
    assert texts_of(tmp_path) == ["of A.TXT", "of b.txt"]
    said = capsys.readouterr().out
    assert all(name in said for name in (".ipynb_checkpoints/A.TXT", "._A.TXT", "README.md", "LICENSE", "notes.doc"))
    for link, aim in (("linked", "folder.txt"), ("gone.txt", "nowhere"), ("b2.txt", "b.txt")):
        (tmp_path / link).symlink_to(aim)
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts_of(tmp_path) == ["of A.TXT", "of b.txt", "of b.txt"]
    said = capsys.readouterr().out
    assert "gone.txt" in said and "linked" in said and "pipe.txt" in said
    (tmp_path / "c.jsonl").write_text(lines("x"))
    with pytest.raises(UserError, match=r"found 2 kinds of files, such as .*c\.jsonl"):
        texts_of(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("of a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: str | Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        texts_of(tmp_path)


def test_rows_without_text_are_counted_and_halves_of_pairs_become_u_fffd(tmp_path: Path) -> None:
    rows = (
        lines("one", None, "", "four") + '\n{"id": 5}\n{"text": "six \\ud83d"}\n{"text": "\\ud83d\\ude00", "id": "x"}\n'
    )
    (tmp_path / "a.jsonl").write_text(rows)
    found, meta = made(tmp_path / "a.jsonl", tmp_path / "data")
    assert sorted(found) == sorted(["one", "four", "six \ufffd", "\U0001f600"])
    assert (meta["documents"], meta["empty_documents"], meta["mended_documents"]) == (8, 4, 1)


def test_texts_stay_texts(tmp_path: Path) -> None:
    """A reader that guesses types makes timestamps of these, and stops where another file gives it another guess."""
    stamps = ["2024-01-01T00:00:00", "2024-01-02T00:00:00"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": each, "other": 1}) + "\n" for each in stamps))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "words", "other": {"x": ["y"]}}) + "\n")
    assert texts_of(tmp_path) == [*stamps, "words"]


def test_parquet_parts_without_rows_are_read_past(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").touch()
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "c.parquet", row_group_size=1)
    assert texts_of(tmp_path) == ["one", "two"]
    parquet.write_table(pyarrow.table({"text": [datetime.datetime(2024, 1, 1)]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet, row 0: text is no text but datetime"):
        texts_of(tmp_path)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"d\.parquet cannot be read"):
        texts_of(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("x", "y").encode())
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "x"}, {"text": "y"}]).encode())
    assert texts_of(tmp_path / "a.txt") == ["one\ntwo\n"]
    assert texts_of(tmp_path / "a.jsonl") == texts_of(tmp_path / "b.json") == ["x", "y"]


@pytest.mark.parametrize("ending", ["gz", "xz", "bz2", "zst"])
def test_packed_files_are_read(ending: str, tmp_path: Path) -> None:
    content = lines(*map(str, range(2000))).encode()
    packed = tmp_path / f"a.jsonl.{ending}"
    if ending == "zst":
        import pyarrow

        with pyarrow.output_stream(str(packed), compression="zstd") as file:
            file.write(content)
    else:
        compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[ending]
        packed.write_bytes(compress(content))
    assert texts_of(packed) == [str(i) for i in range(2000)]


def test_the_sha256_that_is_printed_is_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"\xef\xbb\xbfone\r\ntwo\r\n" * 20
    (tmp_path / "a.txt").write_bytes(content)
    folder = prepare_as(PrepareConfig("mine", str(tmp_path / "a.txt"), data_dir=str(tmp_path)))
    assert hashlib.sha256(content).hexdigest() in capsys.readouterr().out
    assert "\r" not in json.loads((folder / "meta.json").read_text())["tokenizer"]["chars"]


BAD = {
    "jsonl": (lines("a", "b", "c", "d", "e") + "{no json\n" + lines("g"), "02.jsonl:6: not JSON"),
    "txt": (b"caf\xe9", "02.txt is not UTF-8 text .byte 3."),
    "gz": (gzip.compress(lines("a", "b", "c", "d", "e").encode())[:-8], "02.jsonl.gz cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("cure", ["mended", "removed"])
def test_going_on_after_an_odd_file_keeps_what_was_done(
    kind: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ending = tmp_path / "source", {"gz": "jsonl.gz"}.get(kind, kind)
    source.mkdir()

    def write(name: str, *texts: str) -> None:
        if kind == "txt":
            (source / f"{name}.txt").write_text(texts[0])
        else:
            content = lines(*texts).encode()
            (source / f"{name}.{ending}").write_bytes(gzip.compress(content) if kind == "gz" else content)

    for name in ("00", "01", "03", "04"):
        write(name, *(f"{name} {i}" for i in range(1 if kind == "txt" else 4)))
    content, said = BAD[kind]
    bad = source / f"02.{ending}"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    if kind == "txt":
        monkeypatch.setattr(stream, "BATCH", 1)
    with pytest.raises(UserError, match=said) as error:
        made(source, tmp_path / "data")
    assert "the same command goes on from there" in str(error.value)
    done = json.loads((tmp_path / "data" / stream.PROGRESS).read_text())["documents"]
    assert done == (2 if kind == "txt" else 12)
    if cure == "mended" or kind != "txt":  # a file that was read in part can only be mended
        write("02", *"abcdefg")
    else:
        bad.unlink()
    write("05", "new")
    asked: list[str] = []
    original = BYTES.encode_document
    monkeypatch.setattr(type(BYTES), "encode_document", lambda self, text: (asked.append(text), original(text))[1])
    found, _ = made(source, tmp_path / "data")
    assert sorted(found) == sorted(text for text in texts_of(source) if text)
    assert not {"00 0", "01 0"} & set(asked)  # which were read the first time


def test_a_file_that_changed_where_it_was_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a", "b", "c", "d", "e") + "{no json\n")
    with pytest.raises(UserError, match="not JSON"):
        made(tmp_path / "a.jsonl", tmp_path / "data")
    (tmp_path / "a.jsonl").write_text(lines("new", "a", "b", "c", "d", "e"))
    with pytest.raises(UserError, match=r"a\.jsonl has changed before its row 3"):
        made(tmp_path / "a.jsonl", tmp_path / "data")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_one_line(source: str, tmp_path: Path) -> None:
    for config in (
        PrepareConfig("mine", source, data_dir=str(tmp_path)),
        PrepareConfig("mine", f"{source}.jsonl", data_dir=str(tmp_path)),
    ):
        with pytest.raises(UserError, match="cannot read") as error:
            prepare_as(config)
        assert len(str(error.value)) < 400
