"""Documents of files and of the hub become shards: in order, bounded, the same bytes however often it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from local_server import Site, serve

from gptfast import data
from gptfast.data import Shards, load_tokens, parts_of
from gptfast.errors import UserError
from gptfast.packing import PackedBatches
from gptfast.tokenizer import BPETokenizer, load_tokenizer
from train import documents as stream
from train import download as downloading
from train import prepare as page
from train.build import describe_data
from train.documents import Documents, Shape, make_shards, tokenize_all
from train.prepare import PrepareConfig, prepare, prepare_as
from train.tokenizer import train_bpe


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(bytes(range(256)) * 4000) as site:
        yield site


@pytest.fixture(scope="session")
def bpe(text: str) -> BPETokenizer:
    return train_bpe([text], 400)


@pytest.fixture(scope="session")
def bpe_folder(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    bpe.save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def documents(text: str) -> list[str]:
    """200 documents of some lines each; a few are empty, one is long."""
    draw = random.Random(2)
    lines = text.splitlines(keepends=True)
    made = ["".join(draw.choices(lines, k=draw.randint(1, 4))) + f"naïve {i} 😀" for i in range(200)]
    return [*made[:60], "", *made[61:121], "".join(lines[:150]), *made[122:]]


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": each}) + "\n" for i, each in enumerate(documents)))
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH", 7)


def tokens_of(folder: Path, split: str) -> list[int]:
    return [token for part in parts_of(load_tokens(folder / f"{split}.bin", 400)) for token in part.tolist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def expected_tokens(bpe: BPETokenizer, documents: list[str], every: int) -> dict[str, list[int]]:
    """What a data set holds by definition: every `every`-th document is for val, the first included."""
    found: dict[str, list[int]] = {"train": [], "val": []}
    for i, each in enumerate(documents):
        found["val" if i % every == 0 else "train"] += bpe.encode_document(each) if each else []
    return found


def flags(source: object, bpe_folder: str, root: Path, **more: Any) -> PrepareConfig:
    shape = {"val_fraction": 0.1, "shard_tokens": 1000, "processes": 1} | more
    return PrepareConfig("mine", str(source), tokenizer=bpe_folder, data_dir=str(root), **shape)


@pytest.fixture
def whole(jsonl: Path, bpe_folder: str, tmp_path: Path) -> Path:
    """A folder made without a stop."""
    return prepare_as(flags(jsonl, bpe_folder, tmp_path / "whole"))


def test_documents_become_shards_in_order(whole: Path, bpe: BPETokenizer, documents: list[str]) -> None:
    expected = expected_tokens(bpe, documents, 10)
    meta = json.loads((whole / "meta.json").read_text())
    for split in ("train", "val"):
        assert tokens_of(whole, split) == expected[split]
    both = [*expected["train"], *expected["val"]]
    assert both.count(bpe.bos) == len(documents) - 1 == meta["documents"] - 1  # one is empty
    assert meta["text_bytes"] == sum(len(each.encode()) for each in documents)
    train = load_tokens(whole / "train.bin", 400)
    assert isinstance(train, Shards) and len(train.parts) > 5
    for part in train.parts:
        assert int(part[0]) == bpe.bos and len(part) < 1000 + 7 * 500  # no document is in two files
    assert sorted(contents(whole)) == sorted([*meta["files"], "meta.json"])
    assert load_tokenizer(whole).fingerprint == bpe.fingerprint == meta["fingerprint"]
    for name, entry in meta["files"].items():
        assert entry["sha256"] == sha256(whole / name) and entry["bytes"] == (whole / name).stat().st_size
        assert data.inspect(whole / name).tokenizer == bpe.fingerprint


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "json", "txt", "jsonl", "several"])
def test_every_kind_of_file_gives_the_same_tokens(
    tmp_path: Path, documents: list[str], bpe: BPETokenizer, bpe_folder: str, kind: str
) -> None:
    import pyarrow
    from pyarrow import parquet

    kept = [each for each in documents if each]  # an empty .txt file is no document
    lines = [json.dumps({"text": each}) + "\n" for each in kept]
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": kept}), folder / "a.parquet", row_group_size=16, compression="zstd")
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps([{"text": each} for each in kept]))
    elif kind == "txt":
        for i, each in enumerate(kept):
            (folder / f"{i:03d}.txt").write_text(each, "utf-8")
    else:
        cuts = [0, 1, 50, 130, len(lines)] if kind == "several" else [0, len(lines)]
        for i, (first, stop) in enumerate(pairwise(cuts)):
            (folder / f"{i}.jsonl").write_text("".join(lines[first:stop]))
    made = prepare_as(flags(folder, bpe_folder, tmp_path / "data"))
    for split, tokens in expected_tokens(bpe, kept, 10).items():
        assert tokens_of(made, split) == tokens


def test_processes_change_nothing_and_read_only_a_little_ahead(
    whole: Path, jsonl: Path, bpe: BPETokenizer, bpe_folder: str, tmp_path: Path
) -> None:
    made = prepare_as(flags(jsonl, bpe_folder, tmp_path / "two", processes=2))
    assert contents(made) == contents(whole)
    asked = 0

    def tasks() -> Iterator[tuple[int, list[str], dict[str, Any]]]:
        nonlocal asked
        for first in range(100):
            asked += 1
            yield first, ["the text"], {"at": first}

    results = tokenize_all(tasks(), bpe, 10, processes=2)
    for number in range(3):
        found, state = next(results)
        assert state == {"at": number} and found.documents == 1
        assert asked <= number + 4  # two tasks per process, so that memory stays bounded however large the source
    results.close()


def test_a_stop_at_any_write_is_continued_to_the_same_bytes(
    whole: Path, jsonl: Path, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after renames and flushes, over and over until a run gets through: nothing lost nor doubled."""
    monkeypatch.setattr(stream, "SAVED_EVERY_S", 0.0)
    draw, left = random.Random(4), 0

    def deadly(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            original(*arguments)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        return call

    config, folder, stops = flags(jsonl, bpe_folder, tmp_path / "data"), tmp_path / "data" / "mine", 0
    with monkeypatch.context() as patched:
        for name in ("replace", "fsync"):
            patched.setattr(os, name, deadly(getattr(os, name)))
        while not (folder / "meta.json").exists():
            left = draw.randint(1, 30)
            with contextlib.suppress(KeyboardInterrupt):
                prepare_as(config)
                break
            stops += 1
            if not (folder / "meta.json").exists():
                with pytest.raises(UserError, match=r"not finished|no token file"):
                    load_tokens(folder / "train.bin")
    prepare_as(config)
    assert stops > 10 and contents(folder) == contents(whole)


def test_a_stop_between_two_saves_loses_only_time(
    whole: Path, jsonl: Path, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = stream.tokenize, 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (3, 14, 30):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(stream, "tokenize", killed)
    config = flags(jsonl, bpe_folder, tmp_path / "data")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            prepare_as(config)
    assert contents(prepare_as(config)) == contents(whole) and calls > 30 + 3


def test_parts_are_on_the_disk_before_the_progress_that_vouches_for_them(
    jsonl: Path, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SAVED_EVERY_S", 0.0)
    folder, flushed, saves = tmp_path / "data" / "mine", set[int](), 0
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked(source: Path, target: Path) -> None:
        nonlocal saves
        if target.name == stream.PROGRESS:
            assert {part.stat().st_ino for part in folder.glob("*.part")} <= flushed
            flushed.clear()
            saves += 1
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    prepare_as(flags(jsonl, bpe_folder, tmp_path / "data"))
    assert saves > 20


def test_a_killed_command_leaves_no_process_and_goes_on(
    tmp_path: Path, documents: list[str], bpe: BPETokenizer, bpe_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the command's batches are of their own size
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents * 50))
    config = PrepareConfig("mine", str(path), bpe_folder, str(tmp_path), shard_tokens=20_000, processes=2)
    arguments = [f"--{key}={value}" for key, value in dataclasses.asdict(config).items() if value and key != "name"]
    command = [sys.executable, "-m", "train.prepare", "mine", *arguments]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "mine" / stream.PROGRESS).exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert not (tmp_path / "mine" / "meta.json").exists()
    with pytest.raises(ProcessLookupError):  # within pytest's own patience
        while True:
            os.killpg(running.pid, 0)
            time.sleep(0.05)
    prepare_as(dataclasses.replace(config, processes=1))
    for split, tokens in expected_tokens(bpe, documents * 50, 2000).items():
        assert tokens_of(tmp_path / "mine", split) == tokens


def test_a_full_disk_is_a_user_error_and_the_job_goes_on(
    whole: Path, jsonl: Path, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    config = flags(jsonl, bpe_folder, tmp_path / "data")
    with pytest.raises(UserError, match="No space left on device; free some space"):
        prepare_as(config)
    assert contents(prepare_as(config)) == contents(whole)


def test_a_whole_folder_is_checked_and_left(
    whole: Path, jsonl: Path, bpe_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    config = flags(jsonl, bpe_folder, tmp_path / "whole")
    prepare_as(config)
    assert "is whole" in capsys.readouterr().out and contents(whole) == before
    damaged = bytearray(before["train-00002.bin"])
    damaged[-1] ^= 1
    (whole / "train-00002.bin").write_bytes(damaged)
    with pytest.raises(UserError, match=r"train-00002\.bin is missing or damaged"):
        prepare_as(config)


@pytest.mark.parametrize("changed", [{"val_fraction": 0.2}, {"shard_tokens": 10**6}, {"max_tokens": 10}])
def test_a_folder_of_other_flags_is_refused(
    whole: Path, jsonl: Path, bpe_folder: str, tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"of other {next(iter(changed))}; choose another name"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "whole", **changed))
    original = stream.tokenize

    def stops(*arguments: Any) -> Any:
        if arguments[2]:
            raise UserError("stop")
        return original(*arguments)

    monkeypatch.setattr(stream, "tokenize", stops)
    with pytest.raises(UserError, match="stop"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "half"))
    with pytest.raises(UserError, match=f"of other {next(iter(changed))}"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "half", **changed))
    jsonl.write_text(jsonl.read_text() + '{"text": "more"}\n')
    with pytest.raises(UserError, match="of other documents"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "whole"))


def test_max_tokens_stops_early(jsonl: Path, bpe_folder: str, whole: Path, tmp_path: Path) -> None:
    made = prepare_as(flags(jsonl, bpe_folder, tmp_path / "data", max_tokens=5000))
    train = tokens_of(made, "train")
    assert 5000 <= len(train) < 8000 and train == tokens_of(whole, "train")[: len(train)]


def test_ids_past_65535_take_four_bytes(tmp_path: Path, jsonl: Path, documents: list[str]) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 70_000}
    wide = BPETokenizer.from_ranks(ranks, {"<|bos|>": 100_000})
    make_shards(tmp_path / "wide", Documents.find(str(jsonl)), wide, Shape(0.1, 10**6))
    train = load_tokens(tmp_path / "wide" / "train.bin", 100_001)
    assert train.tolist() == expected_tokens(wide, documents, 10)["train"] and max(train.tolist()) == 100_000
    assert data.inspect(tmp_path / "wide" / "train-00000.bin").itemsize == 4


def test_prepared_documents_are_packed(whole: Path, bpe: BPETokenizer) -> None:
    """From the folder to batches; the long document, many rows of it, is among them whole."""
    tokens = load_tokens(whole / "train.bin", 400)
    loader = PackedBatches(tokens, 4, 64, bos=load_tokenizer(whole).bos)
    seen = {tuple(row) for _ in range(400) for row in next(loader).x.tolist()}
    assert all(row[0] == bpe.bos for row in seen)
    body = next(part for part in _split(tokens_of(whole, "train"), bpe.bos) if len(part) > 1000)
    assert all((bpe.bos, *body[i : i + 63]) in seen for i in range(0, len(body) - 64, 64))


def _split(tokens: list[int], bos: int | None) -> list[list[int]]:
    starts = [i for i, token in enumerate(tokens) if token == bos]
    return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


# ---- documents that cannot be had


@pytest.mark.parametrize(
    "content, more, said",
    [
        ("", {}, "stopped|no documents|too few"),
        ('{"text": "one"}\n', {}, "has 1 document, too few for train and val"),
        ('{"text": ""}\n' * 50, {}, "50 documents, too few"),
        ('{"text": "one"}\n', {"column": "body"}, "no column body; set --column to one of text"),
        ('{"text": 5}\n', {}, r"a\.jsonl:1: text is no text but int; choose another --column, or mend"),
        ('{"text": "one"}\n{"text": \n', {}, r"a\.jsonl:2: not JSON in UTF-8"),
        ('{"text": "one"}\n', {"val_fraction": 0.0}, "--val_fraction=0.0"),
        ('{"text": "one"}\n', {"shard_tokens": 0}, "--shard_tokens=0"),
        ('{"text": "one"}\n', {"processes": -1}, "--processes=-1"),
    ],
)
def test_documents_that_are_none(
    tmp_path: Path, bpe_folder: str, content: str, more: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        prepare_as(flags(path, bpe_folder, tmp_path / "data", **more))
    assert not (tmp_path / "data" / "mine").exists()


def test_folders_that_are_no_source(tmp_path: Path, bpe_folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"files of one kind of .*; found none"):
        prepare_as(flags(tmp_path / "empty", bpe_folder, tmp_path / "data"))
    (tmp_path / "empty" / "a.txt").touch()
    (tmp_path / "empty" / "a.jsonl").touch()
    with pytest.raises(UserError, match="found 2 kinds of files"):
        prepare_as(flags(tmp_path / "empty", bpe_folder, tmp_path / "data"))
    with pytest.raises(UserError, match="characters are for a text"):
        prepare_as(flags(tmp_path / "empty", "char", tmp_path / "data"))


@pytest.mark.parametrize("lengths", [(5000,), (3000, 3000), (0, 4000, 200), (200, 4000)])
def test_few_documents_are_cut_for_val(
    lengths: tuple[int, ...], text: str, bpe: BPETokenizer, bpe_folder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Val is a tenth of the tokens at most, at the default val_fraction, wherever the run is stopped."""
    (tmp_path / "folder").mkdir()
    for i, length in enumerate(lengths):
        (tmp_path / "folder" / f"{i}.txt").write_text(text[100 * i :][:length])
    expected = expected_tokens(bpe, [text[100 * i :][:length] for i, length in enumerate(lengths)], 2000)
    first, rest = expected["val"], expected["train"]
    wanted = int((len(first) + len(rest)) * 0.1)
    if not first:
        rest, first = rest[: 1 - wanted], [bpe.bos, *rest[1 - wanted :]]
    elif len(first) > wanted:
        rest, first = [*rest, bpe.bos, *first[wanted:]], first[:wanted]
    config = flags(tmp_path / "folder", bpe_folder, tmp_path, val_fraction=Shape.val_fraction, shard_tokens=10**6)
    replace, truncate, calls, stop = os.replace, os.truncate, 0, 0

    def deadly(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            original(*arguments)

        return call

    monkeypatch.setattr(os, "replace", deadly(replace))
    monkeypatch.setattr(os, "truncate", deadly(truncate))
    while not (tmp_path / "mine" / "meta.json").exists():
        calls, stop = 0, stop + 1
        with contextlib.suppress(KeyboardInterrupt):
            prepare_as(config)
    assert stop > 3 and tokens_of(tmp_path / "mine", "train") == rest and tokens_of(tmp_path / "mine", "val") == first


def test_half_prepared_documents_mix_with_nothing(
    jsonl: Path, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl.write_text(jsonl.read_text() + "no JSON")
    with pytest.raises(UserError, match="not JSON"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path))
    before = contents(tmp_path / "mine")
    with pytest.raises(UserError, match="mine holds documents that are not finished; choose another name"):
        prepare("mine", tmp_path, jsonl.rename(tmp_path / "a.txt"))
    assert contents(tmp_path / "mine") == before and "progress.json" in before
    with pytest.raises(UserError, match=r"mine is not finished; go on by .*: python -m train.prepare mine$"):
        describe_data(tmp_path / "mine")
    assert "vocab_size" not in capsys.readouterr().out


def test_a_folder_with_other_token_files_is_refused(jsonl: Path, bpe_folder: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="holds token files already"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path))


# ---- documents from the network: a server on this machine, and a stream that breaks


def test_documents_of_a_flaky_server_arrive_whole(
    site: Site, jsonl: Path, whole: Path, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading.time, "sleep", lambda seconds: None)
    site.content = jsonl.read_bytes()
    site.cut_after = [1000, 20_000, 5, 3000]
    config = flags(site.url.replace("input.txt", "documents.jsonl"), bpe_folder, tmp_path / "data")
    with pytest.raises(UserError, match=r"cannot download .*documents\.jsonl .*; the same command goes on"):
        prepare_as(config)
    made = prepare_as(config)
    assert site.asked == [None, "bytes=1000-", "bytes=21000-", "bytes=21005-", "bytes=24005-"]
    for split in ("train", "val"):
        assert tokens_of(made, split) == tokens_of(whole, split)


def hub(rows: Callable[[], Iterator[dict[str, str]]], calls: list[Any]) -> Callable[..., Any]:
    """A stand-in for datasets.load_dataset, which streams `rows`."""
    import datasets

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return datasets.IterableDataset.from_generator(rows)

    return load_dataset


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_of_the_hub_that_breaks_goes_on(
    whole: Path, documents: list[str], bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    import datasets

    broken, calls = [30, 31, 120], []  # type: ignore[var-annotated]

    def rows() -> Iterator[dict[str, str]]:
        for i, each in enumerate(documents):
            if i in broken:
                broken.remove(i)
                raise ConnectionError("reset by peer")
            yield {"text": each}

    monkeypatch.setattr(datasets, "load_dataset", hub(rows, calls))
    config = flags("hf:user/name", bpe_folder, tmp_path / "data", subset="small", split="all", processes=processes)
    for _ in range(3):
        with pytest.raises(UserError, match=r"user/name stopped \(ConnectionError: reset by peer\); the same command"):
            prepare_as(config)
    made = prepare_as(config)
    assert calls[0] == (("user/name", "small"), {"split": "all", "streaming": True})
    for split in ("train", "val"):
        assert tokens_of(made, split) == tokens_of(whole, split)


@pytest.mark.parametrize("name", page.ON_THE_HUB)
def test_known_data_sets_are_asked_for_by_name(
    name: str, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", hub(lambda: iter([{"text": "a"}, {"text": "b"}]), calls))
    prepare_as(PrepareConfig(name, tokenizer=bpe_folder, data_dir=str(tmp_path), processes=1))
    repository, subset = page.ON_THE_HUB[name]
    assert calls[0] == ((repository, subset or None), {"split": "train", "streaming": True})
    assert (
        len(load_tokens(tmp_path / name / "train.bin", 400)) == len(load_tokens(tmp_path / name / "val.bin", 400)) == 2
    )
