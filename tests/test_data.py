"""Token files are refused when damaged; random windows are nanoGPT's, packed rows keep their word, both resume."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from gptfast import data, packing
from gptfast.data import Batches, Shards, count_windows, load_tokens, parts_of, whole_split
from gptfast.errors import UserError
from gptfast.packing import PackedBatches


def write(path: Path, tokens: list[int]) -> Path:
    path.write_bytes(b"".join(token.to_bytes(2, "little") for token in tokens))
    return path


def describe(path: Path) -> None:
    """Writes the meta.json that prepare would write beside `path`."""
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path.parent / "meta.json").write_text(
        json.dumps({"vocab_size": 65_536, "tokenizer": {}, "files": {path.name: entry}})
    )


@pytest.fixture(params=["in memory", "mapped"])
def residence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with the file held in memory, and mapped as a large file is."""
    if request.param == "mapped":
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(data, "CHECKED_BLOCK", 4)
    return request.param


# ---- files


def test_tokens_are_little_endian_uint16(tmp_path: Path, residence: str) -> None:
    tokens = load_tokens(write(tmp_path / "train.bin", [0, 1, 256, 50256, 65535]))
    assert tokens.dtype == (torch.int64 if residence == "in memory" else torch.uint16)
    assert tokens.tolist() == [0, 1, 256, 50256, 65535]


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_tokens(tmp_path / "mine" / "train.bin")
    assert str(tmp_path / "mine" / "train.bin") in str(error.value)
    assert f"python -m train.prepare mine --data_dir {tmp_path}" in str(error.value)


@pytest.mark.parametrize("content, reason", [(b"", "empty"), (b"\0", "1 bytes is odd"), (b"\0" * 7, "7 bytes is odd")])
def test_an_empty_or_odd_file_is_damaged(tmp_path: Path, residence: str, content: bytes, reason: str) -> None:
    path = tmp_path / "val.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        load_tokens(path)
    assert str(path) in str(error.value) and "prepare it again" in str(error.value)


def test_a_token_outside_the_vocabulary_is_found_wherever_it_is_sampled(tmp_path: Path, residence: str) -> None:
    for place in (0, 500, 999):
        tokens = [3] * 1000
        tokens[place] = 65
        path = write(tmp_path / "train.bin", tokens)
        assert len(load_tokens(path, vocab_size=66)) == 1000
        with pytest.raises(UserError, match=r"train\.bin has token id 65, but vocab_size is 65"):
            load_tokens(path, vocab_size=65)


def test_ids_from_32768_up_are_not_taken_for_negative(tmp_path: Path, residence: str) -> None:
    path = write(tmp_path / "train.bin", [40_000] * 10)
    with pytest.raises(UserError, match="token id 40000"):
        load_tokens(path, vocab_size=32_768)


def test_block_size_must_leave_a_target(tmp_path: Path) -> None:
    path = write(tmp_path / "val.bin", list(range(65)))
    assert len(load_tokens(path, vocab_size=65, block_size=64)) == 65
    with pytest.raises(UserError, match=r"val\.bin has 65 tokens, too few for block_size 65; set --block_size to 64"):
        load_tokens(path, vocab_size=65, block_size=65)


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "train.bin", list(range(32)))
    describe(path)
    whole = path.read_bytes()
    assert len(load_tokens(path)) == 32
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_tokens(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            load_tokens(path)


def test_a_mapped_file_of_the_wrong_size_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(data, "CHECKED_BLOCK", 4)
    path = write(tmp_path / "train.bin", list(range(32)))
    describe(path)
    write(path, list(range(31)))
    with pytest.raises(UserError, match=r"62 bytes, not the 64 of meta\.json"):
        load_tokens(path)


def test_a_large_file_is_mapped_not_read(tmp_path: Path) -> None:
    """A sparse file of 8 GB opens at once and a batch of it costs no memory to speak of."""
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 8 * 10**9)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = load_tokens(path, vocab_size=1)
    x, _ = next(Batches(tokens, 4, 16, seed=1))
    assert len(tokens) == 4 * 10**9 and x.dtype == torch.int64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 500_000


# ---- batches


def nanogpt_batch(tokens: Tensor, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """The definition: random windows and the same windows one further, drawn from torch's global generator."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([tokens[i : i + block_size] for i in starts.tolist()])
    y = torch.stack([tokens[i + 1 : i + 1 + block_size] for i in starts.tolist()])
    return x, y


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16])
@pytest.mark.parametrize("batch_size, block_size", [(12, 64), (1, 1), (3, 999)])
def test_batches_are_nanogpts_at_the_same_seed(dtype: torch.dtype, batch_size: int, block_size: int) -> None:
    tokens = torch.randint(50_000, (1000,))
    batches = Batches(tokens.to(dtype), batch_size, block_size, seed=5)
    torch.manual_seed(5)
    for _ in range(20):
        x, y = next(batches)
        expected_x, expected_y = nanogpt_batch(tokens, batch_size, block_size)
        assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_every_window_is_drawn_alike_the_last_included() -> None:
    batches = Batches(torch.arange(12), 1000, 4, seed=0)
    seen = Counter(start for _ in range(20) for start in next(batches)[0][:, 0].tolist())
    assert sorted(seen) == list(range(8))  # starts 0 ... 7: the window from 7 has its last target at 11
    assert min(seen.values()) > 0.9 * 20_000 / 8


def test_resume_gives_the_very_next_batches() -> None:
    tokens = torch.randint(65, (5000,))
    straight = Batches(tokens, 4, 32, seed=3)
    for stop in (0, 1, 17, 400):  # 400 batches cross a refill of the generator's 624 words
        interrupted = Batches(tokens, 4, 32, seed=3)
        for _ in range(stop):
            next(interrupted)
        state = interrupted.state_dict()
        next(interrupted)  # the state is a copy: drawing on does not move it
        resumed = Batches(tokens, 4, 32, seed=99)
        resumed.load_state_dict(state)
        straight = Batches(tokens, 4, 32, seed=3)
        for _ in range(stop):
            next(straight)
        for _ in range(50):
            assert torch.equal(next(resumed)[0], next(straight)[0])


def test_nothing_else_that_draws_moves_the_data_nor_does_the_data_move_it() -> None:
    tokens = torch.randint(65, (500,))
    quiet, disturbed = Batches(tokens, 4, 8, seed=1), Batches(tokens, 4, 8, seed=1)
    state = torch.get_rng_state()
    next(quiet)
    assert torch.equal(torch.get_rng_state(), state)
    next(disturbed)
    torch.rand(100)
    assert torch.equal(next(quiet)[0], next(disturbed)[0])


def test_seeds_differ() -> None:
    tokens = torch.randint(65, (5000,))
    assert not torch.equal(next(Batches(tokens, 4, 32, seed=1))[0], next(Batches(tokens, 4, 32, seed=2))[0])


def test_a_batch_is_a_copy() -> None:
    tokens = torch.arange(100)
    x, y = next(Batches(tokens, 4, 8, seed=1))
    x.zero_(), y.zero_()
    assert torch.equal(tokens, torch.arange(100))


def test_batches_need_one_window_and_one_row() -> None:
    with pytest.raises(UserError, match="too few for block_size 10"):
        Batches(torch.arange(10), 4, 10, seed=1)
    with pytest.raises(UserError, match="--batch_size"):
        Batches(torch.arange(10), 0, 4, seed=1)
    with pytest.raises(UserError, match="--block_size"):
        Batches(torch.arange(10), 4, 0, seed=1)


@pytest.mark.gpu
def test_batches_on_cuda_are_those_of_the_cpu() -> None:
    tokens = torch.randint(65, (5000,))
    for (x, y), (x_cpu, y_cpu) in zip(
        (next(Batches(tokens, 8, 64, seed=s, device="cuda")) for s in range(50)),
        (next(Batches(tokens, 8, 64, seed=s)) for s in range(50)),
        strict=True,
    ):
        assert x.is_cuda and torch.equal(x.cpu(), x_cpu) and torch.equal(y.cpu(), y_cpu)


# ---- the whole split


@pytest.mark.parametrize("length, block_size, windows", [(111_540, 64, 1742), (65, 64, 1), (128, 64, 1), (129, 64, 2)])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_whole_split_covers_a_split_once(length: int, block_size: int, windows: int, batch_size: int) -> None:
    tokens = torch.arange(length)
    rows = list(whole_split(tokens, block_size, batch_size=batch_size))
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    assert x.shape == y.shape == (windows, block_size)
    assert torch.equal(x.flatten(), tokens[: windows * block_size])
    assert torch.equal(y, x + 1)
    assert max(len(part) for part, _ in rows) == min(batch_size, windows)


def test_whole_split_reads_mapped_tokens_and_refuses_too_few() -> None:
    x, y = next(whole_split(torch.tensor([1, 2, 65_535], dtype=torch.uint16), 2))
    assert x.tolist() == [[1, 2]] and y.tolist() == [[2, 65_535]] and y.dtype == torch.int64
    with pytest.raises(UserError, match="too few"):
        whole_split(torch.arange(64), 64)


# ---- files with a header, and splits of several files

FINGERPRINT = hashlib.sha256(b"a tokenizer").hexdigest()


def write_shard(path: Path, tokens: list[int], vocab_size: int = 50_257) -> Path:
    """A token file of ours, and its line in meta.json."""
    dtype = "<u2" if vocab_size <= 65_536 else "<u4"
    path.write_bytes(data.header(len(tokens), vocab_size, FINGERPRINT) + np.array(tokens, dtype).tobytes())
    manifest = path.parent / "meta.json"
    meta = {"vocab_size": vocab_size, "tokenizer": {}, "fingerprint": FINGERPRINT, "files": {}}
    meta = json.loads(manifest.read_text()) if manifest.exists() else meta
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "tokens": len(tokens)}
    meta["files"][path.name] = entry
    manifest.write_text(json.dumps(meta))
    return path


def write_llmc(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())
    return path


@pytest.mark.parametrize("vocab_size", [65_536, 65_537, 2**31])
def test_a_shard_gives_back_its_tokens_past_65536_too(tmp_path: Path, residence: str, vocab_size: int) -> None:
    tokens = [0, 1, 65_535, vocab_size - 1] * 3
    loaded = load_tokens(write_shard(tmp_path / "train.bin", tokens, vocab_size), vocab_size, 8)
    assert [part.tolist() for part in parts_of(loaded)] == [tokens]
    x, y = next(Batches(loaded, 4, 8))
    assert x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1]) and set(x.flatten().tolist()) <= set(tokens)


@pytest.mark.parametrize("magic, version, dtype", [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc_files_are_read_without_a_manifest(
    tmp_path: Path, residence: str, magic: int, version: int, dtype: str
) -> None:
    for i in (2, 1):
        write_llmc(tmp_path / f"fineweb_train_{i:06d}.bin", [i, 50_256, 7], magic, version, dtype)
    write_llmc(tmp_path / "fineweb_val_000000.bin", [9, 8], magic, version, dtype)
    train = load_tokens(tmp_path / "train.bin", 50_257)
    assert isinstance(train, Shards) and [part.tolist() for part in train.parts] == [[1, 50_256, 7], [2, 50_256, 7]]
    assert load_tokens(tmp_path / "val.bin").tolist() == [9, 8]
    with pytest.raises(UserError, match=r"000001\.bin has token id 50256, but vocab_size is 50256"):
        load_tokens(tmp_path / "train.bin", 50_256)


def test_an_id_error_names_no_flag_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_tokens(write(tmp_path / "train.bin", [9]), 9)
    assert "prepare the data with this model's tokenizer" in str(error.value) and "--" not in str(error.value)


@pytest.mark.parametrize("version", [0, 2])
def test_an_unknown_version_is_named(tmp_path: Path, version: int) -> None:
    with pytest.raises(UserError, match=f"llm.c's version {version}, and gptfast reads 1"):
        load_tokens(write_llmc(tmp_path / "train.bin", [1, 2], version=version))
    path = write_shard(tmp_path / "val.bin", [1, 2])
    path.write_bytes(path.read_bytes()[:8] + version.to_bytes(4, "little") + path.read_bytes()[12:])
    with pytest.raises(UserError, match=f"version {version}, and this gptfast reads 1"):
        load_tokens(path)


def test_a_shard_cut_short_anywhere_is_found(tmp_path: Path, residence: str) -> None:
    path = write_shard(tmp_path / "train.bin", [1, 2, 3])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"train\.bin is damaged"):
            load_tokens(path)
    path = write_llmc(tmp_path / "val.bin", [1, 2, 3])  # nobody lists this one
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"val\.bin is damaged: it has 1028 bytes, and its 3 tokens take 1030"):
        load_tokens(path)


def test_every_wrong_byte_of_a_header_is_found(tmp_path: Path, residence: str) -> None:
    path = write_shard(tmp_path / "train.bin", [1, 2, 3])
    whole = path.read_bytes()
    for place in range(56):  # after that the header is padding
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|version|another tokenizer"):
            load_tokens(path)


def test_a_wrong_dtype_is_found(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "train.bin", [1, 2])
    path.write_bytes(path.read_bytes()[:12] + (3).to_bytes(4, "little") + path.read_bytes()[16:])
    with pytest.raises(UserError, match="3 bytes per token, not 2 or 4"):
        load_tokens(path)
    write_llmc(tmp_path / "a_val_0.bin", [1, 2])
    write_llmc(tmp_path / "a_val_1.bin", [1, 2], 20240801, 7, "<u4")
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="differ in bytes per token"):
        load_tokens(tmp_path / "val.bin")


def test_a_shard_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "train-00000.bin", [1, 2])
    meta = json.loads((tmp_path / "meta.json").read_text()) | {"fingerprint": "0" * 64}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"train-00000\.bin is of another tokenizer than the one of meta\.json"):
        load_tokens(tmp_path / "train.bin")
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        load_tokens(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for i in range(3):
        write_shard(tmp_path / f"train-{i:05d}.bin", [1, 2])
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"no token file .*train-00001\.bin"):
        load_tokens(tmp_path / "train.bin")


def test_windows_of_several_files_are_all_drawn_alike_and_cross_none(tmp_path: Path, residence: str) -> None:
    parts = [list(range(10)), [100, 101, 102], list(range(200, 217)), list(range(300, 305))]
    for i, part in enumerate(parts):
        write_shard(tmp_path / f"train-{i:05d}.bin", part)
    tokens = load_tokens(tmp_path / "train.bin", 305, 4)
    assert isinstance(tokens, Shards) and len(tokens) == 35
    expected = [part[i : i + 4] for part in parts for i in range(len(part) - 4)]
    batches, seen = Batches(tokens, 1000, 4, seed=0), Counter[tuple[int, ...]]()
    for _ in range(20):
        x, y = next(batches)
        assert torch.equal(y, x + 1)
        seen.update(map(tuple, x.tolist()))
    assert sorted(seen) == sorted(map(tuple, expected)) and min(seen.values()) > 0.85 * 20_000 / len(expected)
    rows = [row for x, _ in whole_split(tokens, 4, batch_size=3) for row in x.tolist()]
    assert rows == [part[i : i + 4] for part in parts for i in range(0, len(part) - 4, 4)]
    assert count_windows(tokens, 4) == len(rows)
    with pytest.raises(UserError, match="has 17 tokens, too few for block_size 17"):
        Batches(tokens, 1, 17)


# ---- packed documents

BOS = 999


def stream(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in (BOS, *document)]


def corpus(draw: random.Random) -> tuple[list[list[int]], Shards]:
    """Documents of distinct tokens, and the same in one to three files; some begin in one file and end in the next."""
    documents: list[list[int]] = []
    for _ in range(draw.randint(1, 30)):
        first = 1000 + sum(map(len, documents))
        documents.append(list(range(first, first + draw.choice([0, 1, 2, 5, draw.randint(1, 40), 90]))))
    tokens = stream([*documents, [10**6]])
    cuts = sorted(draw.sample(range(1, len(tokens)), min(draw.randint(0, 2), len(tokens) - 1)))
    parts = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    return documents, Shards([torch.tensor(part, dtype=draw.choice([torch.int32, torch.int64])) for part in parts])


def split(row: list[int]) -> list[list[int]]:
    """The documents of a row, without their BOS."""
    starts = [i for i, token in enumerate(row) if token == BOS]
    return [row[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


def naive_rows(pieces: list[list[int]], width: int, buffer_size: int, count: int) -> list[list[int]]:
    """Best-fit packing by its definition: pieces, over and over, through a buffer that is searched from end to end."""
    rows, buffer, taken = [], [], 0
    for _ in range(count):
        row: list[int] = []
        while len(row) < width:
            space = width - len(row) - 1
            if space == 0:
                row.append(BOS)
                break
            while len(buffer) < buffer_size:
                buffer.append((taken, pieces[taken % len(pieces)]))
                taken += 1
            fits = [entry for entry in buffer if len(entry[1]) <= space]
            longest = max(fits, key=lambda entry: (len(entry[1]), -entry[0]), default=None)
            chosen = longest or min(buffer, key=lambda entry: (len(entry[1]), -entry[0]))
            buffer.remove(chosen)
            row += [BOS, *chosen[1][:space]]
        rows.append(row)
    return rows


def test_packing_of_1000_random_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row starts with a BOS and is full; documents are whole but the last of a row; what is lost is counted."""
    draw = random.Random(5)
    for _ in range(1000):
        monkeypatch.setattr(packing, "BUFFER", draw.choice([1, 2, 7, 40]))
        monkeypatch.setattr(packing, "SCANNED", draw.choice([1, 3, 10_000]))
        _, tokens = corpus(draw)
        block_size, batch_size, ranks = draw.choice([1, 4, 16, 33]), draw.randint(1, 2), draw.choice([1, 1, 1, 2, 3])
        bodies = [body for part in tokens.parts for body in split([BOS, *part.tolist()]) if body]
        pieces = [body[i : i + block_size] for body in bodies for i in range(0, len(body), block_size)]
        if not pieces:
            continue
        rank = draw.randrange(ranks)
        loader = PackedBatches(tokens, batch_size, block_size, bos=BOS, rank=rank, ranks=ranks)
        assert loader.cropped == 0
        out = Counter[int]()
        rows = []
        for _ in range(2):
            x, y, cu_seqlens = next(loader)
            assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == torch.int64
            assert torch.equal(x[:, 1:], y[:, :-1]) and cu_seqlens.dtype == torch.int32
            starts = [i for i, token in enumerate(x.flatten().tolist()) if token == BOS]
            assert cu_seqlens.tolist() == [*starts, x.numel()] and set(starts) >= set(range(0, x.numel(), block_size))
            rows += [[*a, b[-1]] for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        every = naive_rows(pieces, block_size + 1, packing.BUFFER, 2 * ranks * batch_size)
        theirs = [every[i : i + batch_size] for i in range(0, len(every), batch_size)]
        assert rows == [row for batch in theirs[rank::ranks] for row in batch]
        for row in rows:
            *whole, last = split(row)
            assert row[0] == BOS and all(piece in pieces for piece in whole)
            assert last == [] or any(piece[: len(last)] == last for piece in pieces)
            out.update(token for token in row if token != BOS)
        state = loader.state_dict()
        read = [pieces[i % len(pieces)] for i in range(state["read"])]
        waiting = sum(length for length, *_ in state["buffer"])
        others = sum(token != BOS for row in every for token in row) - out.total()
        assert sum(map(len, read)) == out.total() + others + loader.cropped + waiting


def test_1000_stops_and_other_numbers_of_ranks_lose_no_document() -> None:
    """Documents that fill a row come out in order: each once in every epoch, whoever packs it."""
    documents = [list(range(1000 + 10 * i, 1010 + 10 * i)) for i in range(57)]
    tokens = torch.tensor(stream(documents))
    draw, place, state = random.Random(0), 0, PackedBatches(tokens, 1, 10, bos=BOS).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER", 3)
        teams = [
            [PackedBatches(tokens, 1, 10, bos=BOS, rank=rank, ranks=ranks) for rank in range(ranks)]
            for ranks in (1, 2, 4)
        ]
        for stop in range(1000):
            loaders = teams[stop % 3]
            for loader in loaders:
                loader.load_state_dict(state)
            for _ in range(draw.randint(0, 3)):
                for loader in loaders:
                    assert next(loader).y[0].tolist() == documents[place % len(documents)]
                    place += 1
            state = loaders[0].state_dict()
            assert all(loader.state_dict() == state for loader in loaders)
    assert place > 2000 and state["epoch"] >= place // len(documents)


def test_a_document_longer_than_a_row_is_a_target_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BUFFER", 5)
    document = list(range(1000, 1100))
    loader = PackedBatches(torch.tensor(stream([document])), 1, 32, bos=BOS)
    targets = {token for _ in range(200) for token in next(loader).y.flatten().tolist()}
    assert targets == {BOS, *document}


def test_nanogpts_files_that_end_documents_with_the_token_read_alike() -> None:
    documents = [[1, 2, 3], [4], [5, 6]]
    ended = torch.tensor([token for document in documents for token in (*document, BOS)])
    begun = torch.tensor(stream(documents))
    for a, b, _ in zip(
        PackedBatches(ended, 2, 6, bos=BOS), PackedBatches(begun, 2, 6, bos=BOS), range(5), strict=False
    ):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_packed_batches_resume_exactly_through_json() -> None:
    draw = random.Random(1)
    tokens = Shards([torch.tensor(stream([[7] * draw.randint(1, 70) for _ in range(300)])) for _ in range(3)])
    make = lambda: PackedBatches(tokens, 2, 48, bos=BOS, rank=1, ranks=2)
    for stop in (0, 1, 40, 500):
        straight, other = make(), make()
        for _ in range(stop):
            next(straight)
        state = json.loads(json.dumps(straight.state_dict()))
        assert _is_plain(state)
        next(other)
        other.load_state_dict(state)
        for _ in range(60):
            assert all(torch.equal(a, b) for a, b in zip(next(straight), next(other), strict=True))
        assert straight.state_dict() == other.state_dict()
    assert straight.epoch >= 2


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return type(value) is int


def test_a_place_in_other_data_is_refused() -> None:
    tokens = torch.tensor(stream([[1, 2, 3]] * 20))
    state = PackedBatches(tokens, 1, 8, bos=BOS).state_dict()
    for other in (
        PackedBatches(tokens[:-1], 1, 8, bos=BOS),
        PackedBatches(tokens, 1, 9, bos=BOS),
        PackedBatches(tokens, 1, 8, bos=7),
    ):
        with pytest.raises(UserError, match="was made with"):
            other.load_state_dict(state)


def test_too_few_documents_are_an_error_at_once() -> None:
    with pytest.raises(UserError, match="the data has no documents"):
        PackedBatches(torch.tensor([BOS, BOS, BOS]), 1, 8, bos=BOS)
    two = torch.tensor(stream([[1], [2]]))
    with pytest.raises(ValueError, match="rank is 3"):
        PackedBatches(two, 1, 8, bos=BOS, rank=3, ranks=3)
    with pytest.raises(UserError, match="--block_size"):
        PackedBatches(two, 1, 0, bos=BOS)


def test_cu_seqlens_are_what_attention_takes(generator: torch.Generator) -> None:
    """Packed attention over a batch is attention over each document by itself."""
    tokens = torch.tensor(stream([[5] * n for n in (3, 9, 2, 14, 6, 1, 30)]))
    x, _, cu_seqlens = next(PackedBatches(tokens, 2, 16, bos=BOS))
    q, k, v = torch.randn(3, 1, x.numel(), 2, 8, generator=generator, dtype=torch.float64)
    attention = kernels.load("reference").attention
    together = attention(q, k, v, cu_seqlens=cu_seqlens)
    for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        torch.testing.assert_close(together[:, a:b], attention(q[:, a:b], k[:, a:b], v[:, a:b]))


def test_a_closed_loader_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    loader = PackedBatches(torch.tensor(stream([[1, 2, 3]] * 50)), 2, 6, bos=BOS)
    next(loader)
    (own,) = set(threading.enumerate()) - before
    loader.close()
    own.join(10)
    assert not own.is_alive()
