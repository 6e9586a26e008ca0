"""Preparing data: nanoGPT's bytes, nothing half-written taken for whole, and errors that say what to do offline."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from local_server import Site, serve

from gptfast import cli
from gptfast.data import load_tokens, parts_of
from gptfast.errors import UserError
from gptfast.tokenizer import BPETokenizer, load_tokenizer
from train import download as downloading
from train import prepare as page
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
    assert page.pystdlib_text()[0] == "\n".join(contents[name] for name in kept)
    monkeypatch.setattr(page, "PYSTDLIB_CHARACTERS", 130)
    assert page.pystdlib_text()[0] == "\n".join(contents[name] for name in kept[:3])


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


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(bytes(range(256)) * 4000) as site:
        yield site


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


# ---- token files that are ready


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
