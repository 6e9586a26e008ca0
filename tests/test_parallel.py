"""Several processes are one: the same weights after the same batches, 1/world of the state, checkpoints for any number.

Processes take seconds to start, so each launch of torchrun (gloo, on the CPU) checks many things: this file is also the
program that the ranks run, `torchrun tests/test_parallel.py MODE TENSOR SHARD_SIZE FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from gptfast import checkpoint
from gptfast.config import GPTConfig
from gptfast.data import Batches
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.optim import adamw, muon
from gptfast.parallel import Launch, leave, split
from gptfast.parallel.parts import check_cover
from gptfast.parallel.team import Team
from gptfast.step import Step, evaluate, language_model
from train.guard import Guard

ROOT = Path(__file__).parent.parent
STEPS = 20
CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, bias=False)


EVERY = (("adamw", 1), ("adamw", 4), ("muon", 1), ("muon", 4))
# optimizer, micro-batches of a rank: all of them where all is sharded, which goes through the same code as the others
CASES = {"ddp": EVERY[1:3], "fsdp": EVERY, "hsdp": EVERY[1:3]}


def build(dtype: torch.dtype = torch.float32) -> GPT:
    """Weights five times as large as usual: AdamW amplifies the rounding of gradients about as small as its eps."""
    torch.manual_seed(0)
    model = GPT(CONFIG, kernels.load("reference"), dtype).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.ndim == 2 else 1)
    return model


def dtype_of(tensor: int) -> torch.dtype:
    """fp64 over tensor ranks, which change the rounding of every product: in fp32 one element of AdamW is 2e-5 off."""
    return torch.float64 if tensor > 1 else torch.float32


def make_optimizer(kind: str, model: GPT) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == "adamw":
            return adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rates = dict(matrix_lr=1e-3, embedding_lr=1e-3, head_lr=1e-3, scalar_lr=1e-3)
    optimizer = muon(model, CONFIG, weight_decay=0.1, normalize=True, **rates)
    optimizer.dtype = model.dtype  # in bf16 a rounding that differs shows as 1e-3
    return optimizer


def batches(rank: int = 0, ranks: int = 1) -> Batches:
    tokens = torch.randint(50, (3000,), generator=torch.Generator().manual_seed(3))
    return Batches(tokens, 4, 16, seed=1, rank=rank, ranks=ranks)


def train_alone(
    kind: str, accumulation: int, dtype: torch.dtype, steps: int = STEPS, saved: checkpoint.Checkpoint | None = None
) -> Any:
    model = build(dtype)
    optimizer, stream = make_optimizer(kind, model), batches()
    if saved is not None:
        model.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        stream.load_state_dict(saved.meta["batches"])
    step = Step(language_model(model), optimizer, accumulation=accumulation, clip=1.0, guard=Guard())
    for _ in range(steps):
        step(stream)
    return model, optimizer, stream


def main(mode: str, tensor: str, shard_size: str, folder: str) -> None:
    """What each rank does. Rank 0 prints one JSON line for each optimizer and accumulation."""
    from gptfast.parallel import saving
    from gptfast.parallel.optimizer import ShardedOptimizer
    from gptfast.parallel.team import join

    torch.set_num_threads(1)
    with join(mode, backend="gloo", device="cpu", tensor=int(tensor), shard_size=int(shard_size)) as team:
        largest = lambda number: max(each(team, number))
        for kind, per_rank in CASES[mode]:
            accumulation = per_rank * team.data_size
            alone, its_optimizer, _ = train_alone(kind, accumulation, dtype_of(team.tensor))
            model = build(dtype_of(team.tensor))
            shapes = split.whole_shapes(model)
            called = split.parallelize(model, team)
            optimizer = ShardedOptimizer(make_optimizer(kind, model), model, called, shapes, CONFIG, team)
            stream = batches(team.data_rank, team.data_size)
            syncs = []
            optimizer.sync_gradients = counted(optimizer.sync_gradients, syncs)
            share = team.share(accumulation)
            settings = dict(accumulation=share, clip=1.0, guard=Guard(), team=team)
            update = Step(language_model(called), optimizer, **settings)
            for step in range(STEPS):
                if step == STEPS // 2:
                    out, meta = Path(folder) / f"{kind}{per_rank}", {"batches": stream.state_dict()}
                    saving.save_sharded(out, optimizer, step=step, meta=meta)
                    optimizer.load_state_dict(checkpoint.load(out).optimizer)  # takes its part and goes on the same
                update(stream)
            whole = dict(alone.named_parameters())
            error = 0.0
            for name, p in zip(optimizer.names, optimizer.parameters, strict=True):
                matrices = whole[name].detach().split(split.stacked_rows(name, shapes[name], CONFIG))
                for part in optimizer.rectangles(name, team.rank):
                    here = part.of_local(split.local(p)) - part.of_whole(matrices[part.matrix])
                    error = max(error, here.abs().max().item())
            held = bytes_of(optimizer.optimizer)
            evaluated = evaluate(called, itertools.islice(batches(), 5), team).item()
            expected = evaluate(alone, itertools.islice(batches(), 5)).item()
            facts = {
                "optimizer": kind, "accumulation": per_rank, "error": largest(error),
                "state_share": largest(held) / bytes_of(its_optimizer), "evaluation_error": abs(evaluated - expected),
                "syncs_per_step": sum(syncs) / STEPS, "backwards_per_step": len(syncs) / STEPS,
            }  # fmt: skip
            if team.is_main:
                print(json.dumps(facts), flush=True)


def counted(function: Any, calls: list[bool]) -> Any:
    def call(needed: bool) -> None:
        calls.append(needed)
        function(needed)

    return call


def each(team: Team, number: float) -> list[float]:
    """The number that every rank gives."""
    found: list[Any] = [None] * team.size
    torch.distributed.all_gather_object(found, number)
    return found


def bytes_of(optimizer: Any) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())


def torchrun(ranks: int, *arguments: str, timeout_s: float = 170) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s, env=environment
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo and torchrun")
@pytest.mark.parametrize(
    ("ranks", "mode", "tensor", "shard_size"),
    [(2, "ddp", 1, 0), (2, "fsdp", 1, 0), (2, "fsdp", 2, 0), (4, "hsdp", 1, 2)],
)
def test_ranks_together_are_one_process(tmp_path: Path, ranks: int, mode: str, tensor: int, shard_size: int) -> None:
    """Weights within 1e-6 after 20 steps of the same global batch, saved and loaded half way; state shared out."""
    done = torchrun(ranks, str(Path(__file__)), mode, str(tensor), str(shard_size), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert tuple((row["optimizer"], row["accumulation"]) for row in found) == CASES[mode]
    sharers = shard_size or ranks
    for row in found:
        assert row["error"] < (1e-6 if tensor == 1 else 1e-12) and row["evaluation_error"] < 1e-5, row
        assert 1 / sharers <= row["state_share"] < 1.15 / sharers, row
        assert (row["syncs_per_step"], row["backwards_per_step"]) == (1, row["accumulation"]), row

    for kind, per_rank in (("adamw", 4), ("muon", 1)):  # and one process goes on where they were half way
        accumulation = per_rank * ranks // tensor
        saved = checkpoint.load(tmp_path / f"{kind}{per_rank}")
        resumed, _, _ = train_alone(kind, accumulation, dtype_of(tensor), STEPS // 2, saved)
        whole, _, _ = train_alone(kind, accumulation, dtype_of(tensor))
        for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


# ---- without processes


def teams(mode: str, size: int, shards: int, tensor: int = 1) -> list[Team]:
    replicas = size // shards // tensor
    return [Team(mode, Launch(rank, size, by_torchrun=True), replicas, shards, tensor) for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "shards", "tensor"), [(3, 3, 1), (4, 2, 2), (8, 8, 1), (6, 3, 2), (2, 1, 2), (64, 64, 1)]
)
def test_rectangles_cover_every_matrix_once(size: int, shards: int, tensor: int) -> None:
    """Among the ranks of one replica each element has one holder, or, in the tensor groups, as many as there are."""
    for name, p in build().named_parameters():
        matrices = p.detach().split(split.stacked_rows(name, p.shape, CONFIG))
        seen = [torch.zeros_like(matrix) for matrix in matrices]
        for team in teams("fsdp", size, shards, tensor):
            for part in split.rectangles(name, p.shape, CONFIG, team, team.rank):
                part.of_whole(seen[part.matrix]).add_(1)
        counts = torch.cat([matrix.flatten() for matrix in seen]).unique().tolist()
        replicated = name.startswith("transformer.h.") and not name.endswith((*split.BY_COLUMN, *split.BY_ROW))
        assert counts == [tensor if replicated else 1], (name, counts)


@pytest.mark.parametrize(
    ("shape", "pieces", "said"),
    [
        ((4, 6), [((0, 0), (2, 6)), ((2, 0), (1, 6))], "do not make up its shape"),
        ((10**9, 6), [((0, 0), (2, 6)), ((10**9 - 1, 0), (1, 6))], "do not make up its shape"),
        ((4, 6), [((0, 0), (3, 6)), ((2, 0), (1, 6))], "hold the same elements"),
        ((4, 6), [((0, 0), (4, 7))], "outside its shape"),
        ((4, 6), [((-1, 0), (4, 6))], "outside its shape"),
        ((4,), [((0, 0), (4, 1))], "outside its shape"),
    ],
)
def test_pieces_that_do_not_hold_a_tensor_once_are_refused(shape: tuple, pieces: list, said: str) -> None:
    with pytest.raises(ValueError, match=f"w.* {said}"):
        check_cover("w", shape, pieces)
    check_cover("w", (4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3)), ((0, 0), (0, 6))])


def test_the_stream_of_batches_does_not_depend_on_the_number_of_ranks() -> None:
    """Stopped at random points, gone on by 1, 2, 4 and 1 ranks: the micro-batches are those of one alone, in order."""

    def key(batch: tuple[Tensor, Tensor]) -> bytes:
        return batch[0].numpy().tobytes() + batch[1].numpy().tobytes()

    alone = batches()
    expected = [key(next(alone)) for _ in range(4 * 400)]
    draw, position, state = random.Random(0), 0, batches().state_dict()
    for stop in range(1000):
        ranks = (1, 2, 4)[stop % 3]
        streams = [batches(rank, ranks) for rank in range(ranks)]
        turns = draw.randint(0, 2)
        if position + turns * ranks > len(expected):
            break
        for stream in streams:
            stream.load_state_dict(state)
        for _ in range(turns):
            for stream in streams:
                assert key(next(stream)) == expected[position]
                position += 1
        states = [stream.state_dict()["generator"] for stream in streams]
        assert all(torch.equal(states[0], other) for other in states)
        state = streams[0].state_dict()
    assert position > 1000


def test_shares_that_do_not_fit_are_refused() -> None:
    team = teams("fsdp", 8, 8)[0]
    assert team.share(40) == 5
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=12: 8 ranks .* such as 16"):
        team.share(12)


def test_ddp_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever name this torch, or an older one, has for "send no buffers around"."""
    team = Team("ddp", Launch(0, 2, by_torchrun=True), 2, mesh=object())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            called = split.parallelize(build(), team)
        assert isinstance(called, torch.nn.parallel.DistributedDataParallel)
        given = []
        older = lambda model, *, broadcast_buffers, gradient_as_bucket_view: given.append(broadcast_buffers)
        monkeypatch.setattr(split, "DistributedDataParallel", older)
        split.parallelize(build(), team)
        assert given == [False]
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
