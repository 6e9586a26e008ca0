"""Preparing data: nanoGPT's bytes, nothing half-written taken for whole, and errors that say what to do offline."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptfast import cli, data
from gptfast.cli import UserError
from gptfast.data import Shards, load_tokens, parts_of
from gptfast.packing import PackedBatches
from gptfast.tokenizer import BPETokenizer, load_tokenizer
from train import documents as stream
from train import download as downloading
from train import prepare as page
from train.documents import Documents, Shape, make_shards, tokenize_all
from train.download import download
from train.prepare import PrepareConfig, hub_file, main, prepare, prepare_as
from train.tokenizer import train_bpe

TINYSHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare" / "input.txt"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8")
    return path


# ---- what is written


def test_tinyshakespeare_is_nanogpts_byte_for_byte(tmp_path: Path) -> None:
    if not TINYSHAKESPEARE.exists():
        pytest.skip(f"needs {TINYSHAKESPEARE}")
    folder = prepare("shakespeare_char", tmp_path, TINYSHAKESPEARE)
    assert (folder / "train.bin").stat().st_size == 2_007_708 and sha256(folder / "train.bin").startswith(
        "6ec305602a99"
    )
    assert (folder / "val.bin").stat().st_size == 223_080 and sha256(folder / "val.bin").startswith("d37d30cc0c83")
    assert (
        len(load_tokens(folder / "train.bin", 65)) == 1_003_854 and len(load_tokens(folder / "val.bin", 65)) == 111_540
    )
    assert load_tokenizer(folder).vocab_size == 65
    assert sha256(TINYSHAKESPEARE) == page.SHAKESPEARE_SHA256


def test_any_text_is_tokenized_by_nanogpts_rule(tmp_path: Path, source: Path, text: str) -> None:
    text = text[:30_001]  # 90% of it is 27,000.9 characters: nanoGPT rounds down
    source.write_text(text)
    folder = prepare("mine", tmp_path / "data", source)
    assert folder == tmp_path / "data" / "mine"
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
        assert (folder / name).read_bytes() == np.array([ids[char] for char in part], dtype="<u2").tobytes()
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["vocab_size"] == len(ids) and meta["source"] == str(source)
    assert meta["files"]["val.bin"] == {"bytes": 2 * (len(text) - cut), "sha256": sha256(folder / "val.bin")}
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_text_survives_the_round_trip_with_any_unicode(tmp_path: Path) -> None:
    text = "naïve 😀\r\nline\tΩ\u2028" * 20
    (tmp_path / "t").write_bytes(text.encode())
    folder = prepare("mine", tmp_path, tmp_path / "t")
    ids = [*load_tokens(folder / "train.bin").tolist(), *load_tokens(folder / "val.bin").tolist()]
    assert load_tokenizer(folder).decode(ids) == text.replace("\r\n", "\n")  # newlines as Python's text mode reads them


def test_the_command_says_what_it_read_and_wrote(
    tmp_path: Path, source: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(main, ["shakespeare_char", f"--source={source}", "--data_dir", str(tmp_path / "d")]) == 0
    said = capsys.readouterr().out
    assert f"read {source}: sha256 {sha256(source)}" in said
    assert f"length of dataset in characters: {len(text):,}" in said and f"vocab size: {len(set(text))}" in said
    assert f"train has {int(0.9 * len(text)):,} tokens" in said and str(tmp_path / "d" / "shakespeare_char") in said


# ---- the standard library


@pytest.fixture(scope="session")
def pystdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("pystdlib", tmp_path_factory.mktemp("data"))


def test_pystdlib_is_megabytes_of_plain_source(pystdlib: Path) -> None:
    train, val = load_tokens(pystdlib / "train.bin", 96), load_tokens(pystdlib / "val.bin", 96)
    length = len(train) + len(val)
    assert 3_000_000 < length <= page.PYSTDLIB_CHARACTERS and len(train) == int(0.9 * length)
    tokenizer = load_tokenizer(pystdlib)
    assert tokenizer.vocab_size <= 96 and set(tokenizer.decode(range(tokenizer.vocab_size))) <= set(
        "\n" + "".join(map(chr, range(32, 127)))
    )
    assert "def __init__(self" in tokenizer.decode(val[:100_000].tolist())


def test_pystdlib_is_the_same_every_time(pystdlib: Path, tmp_path: Path) -> None:
    again = prepare("pystdlib", tmp_path)
    assert all((again / name).read_bytes() == (pystdlib / name).read_bytes() for name in ("train.bin", "val.bin"))


def test_pystdlib_order_and_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a library of our own: what is left out, the order by sha256 of the path, and the cap at whole files."""
    contents = {
        "abc.py": "a" * 40, "json/decoder.py": "j" * 40, "json/__init__.py": "i" * 40, "ast.py": "s" * 40,
        "test/test_abc.py": "X", "json/tests/t.py": "X", "idlelib/run.py": "X", "site-packages/numpy.py": "X",
        "_sysconfigdata__linux.py": "X", "config-3/x.py": "X", "encodings/cp037.py": "X",
        "copy.py": "caf\u00e9", "csv.py": "tab\t", "bdb.py": "", "cmd.py": "form\ffeed",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, "utf-8")
    monkeypatch.setattr(page.sysconfig, "get_path", lambda name: str(tmp_path))
    kept = [name for name in contents if contents[name] in ("a" * 40, "j" * 40, "i" * 40, "s" * 40)]
    kept.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert page._pystdlib_text()[0] == "\n".join(contents[name] for name in kept)
    monkeypatch.setattr(page, "PYSTDLIB_CHARACTERS", 130)
    assert page._pystdlib_text()[0] == "\n".join(contents[name] for name in kept[:3])


def test_a_python_without_its_source_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no standard library source"):
        prepare("pystdlib", tmp_path / "data")


# ---- mistakes


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "python -m train.prepare shakespeare_char"),
        (["shakespear_char"], "did you mean shakespeare_char"),
        (["../outside"], "cannot name a data set"),
        (["mine", "--source=missing.txt"], "cannot read missing.txt: No such file or directory"),
        (["mine", "--source=missing"], "cannot read missing: No such file or directory"),
        (["mine", "--source=missing.parquet"], "cannot read missing.parquet: No such file or directory"),
        (["pystdlib", "--source=missing.txt"], "pystdlib reads the running Python"),
        (["mine", "--sorce=x"], "did you mean --source"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.run(main, [*arguments, f"--data_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, said", [(b"", "too few"), (b"short", "too few"), (b"\xff\xfe" * 50, "not UTF-8")])
def test_a_source_that_is_no_text_to_train_on(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare("mine", tmp_path / "data", tmp_path / "t")


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path, source: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"cannot write .*taken.*choose another --data_dir"):
        prepare("mine", tmp_path / "taken", source)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_no_mixture_that_loads(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, call: str, fail_at: int
) -> None:
    folder = prepare("mine", tmp_path, source)
    before = {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    source.write_text(source.read_text()[::-1])
    original, count = getattr(os, call), 0

    def fails(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count == fail_at:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        prepare("mine", tmp_path, source)
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    for name in ("train.bin", "val.bin"):
        if (folder / name).read_bytes() == before[name]:
            load_tokens(folder / name)
        else:
            with pytest.raises(UserError, match="damaged"):
                load_tokens(folder / name)


# ---- downloads, from a server on this machine


@dataclass
class Site:
    """What the server serves and how it misbehaves, and the byte ranges it was asked for."""

    content: bytes
    files: dict[str, bytes] = field(default_factory=dict)  # by the end of the path; all others are `content`
    cut_after: list[int] = field(default_factory=list)  # of each coming request: close after so many bytes
    ranges: bool = True
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site(content=bytes(range(256)) * 4000)

    class Handler(BaseHTTPRequestHandler):
        def content(self) -> bytes:
            return site.files.get(self.path.split("/")[-1], site.content)

        def do_HEAD(self) -> None:
            """As the hub answers for a large file: its sha256 is its tag."""
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content())))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(self.content()).hexdigest()}"')
            self.end_headers()

        def do_GET(self) -> None:
            content = self.content()
            asked = self.headers.get("Range")
            site.asked.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and site.ranges else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = start + site.cut_after.pop(0) if site.cut_after else None
            self.wfile.write(content[start:stop])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/input.txt"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(site: Site, path: Path, attempts: int = 3) -> None:
    sha256 = hashlib.sha256(site.content).hexdigest()
    download(site.url, path, sha256, otherwise="use a file", attempts=attempts, wait_s=0)


def test_a_download_arrives_whole_and_shows_progress(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(site, tmp_path / "new" / "input.txt")
    assert (tmp_path / "new" / "input.txt").read_bytes() == site.content
    assert "100% of 1.0 MB" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["input.txt"]


def test_a_cut_download_continues_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000, 200_000]
    fetch(site, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == site.content
    assert site.asked == [None, "bytes=300000-", "bytes=500000-"]


def test_the_next_run_continues_too(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000]
    with pytest.raises(UserError, match="300,000 of 1,024,000 bytes"):
        fetch(site, tmp_path / "input.txt", attempts=1)
    assert not (tmp_path / "input.txt").exists()
    fetch(site, tmp_path / "input.txt", attempts=1)
    assert (tmp_path / "input.txt").read_bytes() == site.content and site.asked[1] == "bytes=300000-"


def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cut_after = False, [300_000]
    fetch(site, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == site.content


def test_a_whole_part_left_by_a_crash_is_taken(site: Site, tmp_path: Path) -> None:
    (tmp_path / "input.txt.part").write_bytes(site.content)
    fetch(site, tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_bytes() == site.content


@pytest.mark.parametrize("part", [b"", b"not the beginning of this file"])
def test_wrong_bytes_fail_by_checksum_and_are_removed(site: Site, tmp_path: Path, part: bytes) -> None:
    if part:
        (tmp_path / "input.txt.part").write_bytes(part)
    expected = "0" * 64 if not part else hashlib.sha256(site.content).hexdigest()
    with pytest.raises(UserError, match=r"sha256 .* run again, or use a file"):
        download(site.url, tmp_path / "input.txt", expected, otherwise="use a file")
    assert not list(tmp_path.iterdir())


def test_offline_says_exactly_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr(downloading.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/input\.txt") as error:
        prepare("shakespeare_char", tmp_path)
    assert "python -m train.prepare shakespeare_char --source FILE" in str(error.value)


def test_shakespeare_downloads_once(site: Site, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site.content = text.encode()
    monkeypatch.setattr(page, "SHAKESPEARE_URL", site.url)
    monkeypatch.setattr(page, "SHAKESPEARE_SHA256", hashlib.sha256(site.content).hexdigest())
    folder = prepare("shakespeare_char", tmp_path)
    prepare("shakespeare_char", tmp_path)
    assert len(site.asked) == 1 and len(load_tokens(folder / "val.bin")) == len(text) - int(0.9 * len(text))
    (folder / "input.txt").write_text(text + "!")
    with pytest.raises(UserError, match="is not tinyshakespeare"):
        prepare("shakespeare_char", tmp_path)


# ---- texts in tokens of byte pair encoding


@pytest.fixture(scope="session")
def bpe(text: str) -> BPETokenizer:
    return train_bpe([text], 400)


@pytest.fixture(scope="session")
def bpe_folder(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    bpe.save(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["shakespeare", "mine"])
def test_a_text_in_bpe_is_nanogpts_layout(
    tmp_path: Path, source: Path, text: str, bpe: BPETokenizer, bpe_folder: str, name: str
) -> None:
    folder = prepare_as(PrepareConfig(name, str(source), tokenizer=bpe_folder, data_dir=str(tmp_path)))
    cut = int(0.9 * len(text))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert (folder / f"{split}.bin").read_bytes() == np.array(bpe.encode(part), "<u2").tobytes()
        assert load_tokenizer(folder).decode(load_tokens(folder / f"{split}.bin", 400).tolist()) == part


def test_shakespeare_is_nanogpts_counts_where_gpt2s_ranks_are(tmp_path: Path) -> None:
    if not TINYSHAKESPEARE.exists():
        pytest.skip(f"needs {TINYSHAKESPEARE}")
    try:
        BPETokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    folder = prepare("shakespeare", tmp_path, TINYSHAKESPEARE)
    counts = [len(load_tokens(folder / f"{split}.bin", 50_257)) for split in ("train", "val")]
    assert counts == [301_966, 36_059] and not (folder / "meta.pkl").exists()


def test_a_text_too_large_for_memory_says_what_to_do(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "TEXT_BYTES", 1000)
    with pytest.raises(UserError, match=r"40,\d\d\d bytes, and a text is read whole; put its documents into a \.jsonl"):
        prepare("mine", tmp_path, source)


# ---- documents


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
    monkeypatch.setattr(stream, "tokenize", lambda *_: (_ for _ in ()).throw(UserError("stop")))
    with pytest.raises(UserError, match="stop"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "half"))
    with pytest.raises(UserError, match=f"of other {next(iter(changed))}"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "half", **changed))
    jsonl.write_text(jsonl.read_text() + '{"text": "more"}\n')
    with pytest.raises(UserError, match="of other documents"):
        prepare_as(flags(jsonl, bpe_folder, tmp_path / "half"))


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
        ('{"text": "one"}\n', {}, "1 documents, too few for train and val"),
        ('{"text": ""}\n' * 50, {}, "50 documents, too few"),
        ('{"text": "one"}\n', {"column": "body"}, "no column body; set --column to one of text"),
        ('{"text": 5}\n', {}, "document 0 is no text but int"),
        ('{"text": "one"}\n{"text": \n', {}, "stopped .*JSON"),
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
    assert not (tmp_path / "data" / "mine" / "meta.json").exists()


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


def test_ready_files_are_fetched_by_their_sha256_and_go_on(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(page, "hub_file", partial(hub_file, endpoint=site.url.removesuffix("/input.txt")))
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 1000
    for name in ("val_000000", "train_000001", "train_000002"):
        tokens = np.arange(1000, dtype="<u2") + len(site.files)
        site.files[f"fineweb_{name}.bin"] = header.tobytes() + tokens.tobytes()
    site.cut_after = [3024, 500, 0, 0]
    config = PrepareConfig("fineweb10B", data_dir=str(tmp_path), max_tokens=2 * page.READY_TOKENS)
    with pytest.raises(UserError, match=r"cannot download .*fineweb_train_000001"):
        prepare_as(config)
    with pytest.raises(UserError, match=r"no token file"):
        load_tokens(tmp_path / "fineweb10B" / "train.bin")
    asked = len(site.asked)
    folder = prepare_as(config)
    assert site.asked[asked:] == ["bytes=500-", None]  # the finished one is not fetched again
    assert [part[0].item() for part in parts_of(load_tokens(folder / "train.bin", 50_257))] == [1, 2]
    assert load_tokens(folder / "val.bin", 50_257, 999).tolist() == list(range(1000))
    (folder / "fineweb_train_000002.bin").write_bytes(site.files["fineweb_train_000002.bin"][:-2])
    with pytest.raises(UserError, match="damaged"):
        load_tokens(folder / "train.bin")
    prepare_as(config)
    assert (folder / "fineweb_train_000002.bin").read_bytes() == site.files["fineweb_train_000002.bin"]


def test_a_hub_that_cannot_be_reached_or_states_no_sha256(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9/datasets/user/name/resolve/main/a\.bin"):
        hub_file("user/name", "a.bin", "http://127.0.0.1:9")
    monkeypatch.setattr(hashlib, "sha256", hashlib.md5)
    with pytest.raises(UserError, match="states no sha256"):
        hub_file("user/name", "a.bin", site.url.removesuffix("/input.txt"))
