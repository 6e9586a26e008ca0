"""Token files are refused when damaged, and batches are nanoGPT's, resume exactly, and cost no loop."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptfast import data
from gptfast.cli import UserError
from gptfast.data import Batches, load_tokens, whole_split


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
