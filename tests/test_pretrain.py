"""The trainer: nanoGPT's flags, schedule and log lines, one step's arithmetic, and how mistakes are answered."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kernels
from gptfast import checkpoint, cli, hf, mfu
from gptfast.config import GPTConfig
from gptfast.data import Batches
from gptfast.engine import Engine, Sampling
from gptfast.errors import UserError
from gptfast.log import check_row
from gptfast.log.lines import iteration_line
from gptfast.model import GPT
from gptfast.optim import adamw, set_learning_rate
from gptfast.packing import document_starts
from gptfast.step import Step, evaluate, language_model
from gptfast.tokenizer import BPETokenizer
from train import build, pretrain, schedules, trainer
from train.config import Pretrain
from train.prepare import prepare
from train.presets import PRESETS

ROOT = Path(__file__).parent.parent
NANOGPT = {  # train.py of nanoGPT, lines 35 to 76; its dtype is chosen when it runs
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "backend": "nccl",
    "device": "cuda", "dtype": "auto", "compile": True,
}  # fmt: skip
TINY = [
    "--device=cpu", "--compile=False", "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=1",
    "--n_layer=1", "--n_head=2", "--n_embd=16", "--max_iters=4", "--eval_interval=2", "--eval_iters=2",
    "--warmup_iters=2", "--lr_decay_iters=4", "--learning_rate=1e-2", "--dataset=tiny",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, text: str) -> Path:
    source = tmp_path / "text.txt"
    source.write_text(text[:4000])
    prepare("tiny", tmp_path / "data", source)
    return tmp_path / "data"


@pytest.fixture
def flags(tmp_path: Path, data: Path) -> list[str]:
    return [*TINY, f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}"]


def rows(out_dir: Path, what: str) -> list[dict]:
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(check_row, map(json.loads, lines)) if row["what"] == what]


def checkpoints(out_dir: Path) -> list[str]:
    return sorted(path.name for path in out_dir.glob("ckpt-*"))


# ---- flags


def test_the_33_keys_and_their_defaults() -> None:
    assert len(NANOGPT) == 33
    ours = dataclasses.asdict(Pretrain())
    assert {key: ours[key] for key in NANOGPT} == NANOGPT


def test_presets_hold_nanogpts_values() -> None:
    def differs(name: str) -> dict[str, object]:
        return {
            key: value for key, value in dataclasses.asdict(PRESETS[name]).items() if value != getattr(Pretrain(), key)
        }

    assert differs("train_shakespeare_char") == dict(
        out_dir="out-shakespeare-char", eval_interval=250, log_interval=10, always_save_checkpoint=False,
        wandb_project="shakespeare-char", wandb_run_name="mini-gpt", dataset="shakespeare_char",
        gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
        learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
    )  # fmt: skip
    assert differs("train_gpt2") == dict(
        wandb_log=True, wandb_run_name="gpt2-124M", eval_interval=1000, log_interval=10
    )
    assert differs("finetune_shakespeare") == dict(
        out_dir="out-shakespeare", eval_interval=5, eval_iters=40, wandb_project="shakespeare", wandb_run_name="ft",
        dataset="shakespeare", init_from="gpt2-xl", always_save_checkpoint=False, batch_size=1,
        gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, decay_lr=False,
    )  # fmt: skip
    for size in ("", "-medium", "-large", "-xl"):
        expected = dict(batch_size=8, eval_iters=500, eval_only=True, init_from=f"gpt2{size}")
        assert differs(f"eval_gpt2{size.replace('-', '_')}") == expected


@pytest.mark.parametrize(
    "flag", ["--batch_size=0", "--dropout=1", "--beta2=1.5", "--learning_rate=nan", "--max_iters=-1"]
)
def test_impossible_values_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match=flag.split("=")[0]):
        cli.parse(Pretrain, [flag], PRESETS)


# ---- schedule, MFU line, one step


def test_learning_rate() -> None:
    config = PRESETS["train_shakespeare_char"]
    expected = {0: 9.90099e-6, 99: 9.90099e-4, 100: 1e-3, 2550: 5.5e-4, 5000: 1e-4, 5001: 1e-4}
    for iteration, rate in expected.items():
        assert schedules.learning_rate(iteration, config) == pytest.approx(rate, rel=1e-6)
    constant = dataclasses.replace(config, decay_lr=False)
    assert {schedules.learning_rate(iteration, constant) for iteration in expected} == {1e-3}


def test_mfu_line_of_nanogpts_char_model_on_an_a100() -> None:
    config = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
    rate = 64 * 256 / 33.22e-3
    used = mfu.utilization(rate, config, 256, peak=mfu.peak("A100 SXM 40GB"), dtype=torch.bfloat16)
    assert 100 * used["mfu_palm"] == pytest.approx(11.217, abs=5e-4)
    assert iteration_line(10, 2.34567, 33.219, used["mfu_palm"]) == "iter 10: loss 2.3457, time 33.22ms, mfu 11.22%"
    assert iteration_line(0, 4.2, 5.0, None) == "iter 0: loss 4.2000, time 5.00ms, mfu n/a"


def small_model(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16, bias=True)
    return GPT(config, kernels.load("reference"), dtype)


def small_optimizer(model: GPT) -> torch.optim.Optimizer:
    return adamw(model, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.1)


def small_batches(batch_size: int) -> Batches:
    tokens = torch.randint(50, (500,), generator=torch.Generator().manual_seed(0))
    return Batches(tokens, batch_size, 16, seed=1, device="cpu")


def test_accumulation_over_micro_batches_is_one_large_batch() -> None:
    tokens, targets = next(small_batches(12))
    updated = []
    for accumulation in (1, 4):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        batches = zip(tokens.chunk(accumulation), targets.chunk(accumulation), strict=True)
        loss = Step(language_model(model), optimizer, accumulation=accumulation)(batches)
        updated.append((loss, *model.parameters()))
    for whole, accumulated in zip(*updated, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6)


def test_a_compiled_step_is_the_eager_step() -> None:
    updated = []
    for compiled in (False, True):
        model = small_model()
        optimizer = small_optimizer(model)
        step = Step(language_model(model), optimizer, clip=0.5, compiled=compiled)
        batches = small_batches(4)
        for rate in (0.01, 0.02, 0.03):  # a graph that had the first rate compiled in would go astray
            set_learning_rate(optimizer, rate)
            loss = step(batches)
        updated.append((loss, *model.parameters()))
    for eager, compiled in zip(*updated, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_clip_bounds_the_whole_gradient_and_0_leaves_it() -> None:
    moved = {}
    for clip in (0.0, 0.01):
        model = small_model()
        before = [p.detach().clone() for p in model.parameters()]
        Step(language_model(model), torch.optim.SGD(model.parameters(), lr=1.0), clip=clip)(small_batches(4))
        moves = [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
        moved[clip] = torch.cat(moves).norm().item()
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[0.0] > 0.1


def test_learning_rate_reaches_every_group_and_keeps_its_scale() -> None:
    model = small_model()
    optimizer = small_optimizer(model)
    optimizer.param_groups[1]["lr_scale"] = 0.5
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_evaluation_weighs_by_tokens_and_touches_nothing() -> None:
    model = small_model()
    tokens, targets = next(small_batches(5))
    state = torch.get_rng_state()
    uneven = [(tokens[:4], targets[:4]), (tokens[4:], targets[4:])]
    torch.testing.assert_close(evaluate(model, uneven), model(tokens, targets).detach())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_fp16_scales_the_loss_and_skips_an_overflow() -> None:
    model = small_model(torch.float16)
    optimizer = small_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows until it has come down
    before = model.lm_head.weight.detach().clone()
    batches = small_batches(4)
    step = Step(language_model(model), optimizer, clip=1.0, scaler=scaler)
    step(batches)
    assert torch.equal(model.lm_head.weight, before)
    assert scaler.get_scale() < 2.0**40
    for _ in range(40):
        loss = step(batches)
    assert loss.item() < 3.9  # from ln 50 = 3.91
    assert not torch.equal(model.lm_head.weight, before)


# ---- whole runs


def test_a_run_prints_nanogpts_lines_and_writes_rows(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(pretrain.main, flags) == 0
    out = capsys.readouterr().out
    assert "Overriding: n_embd = 16\n" in out
    assert "tokens per iteration will be: 64\n" in out
    assert re.search(r"^dtype: (float32|bfloat16), the CPU has ", out, re.MULTILINE)
    assert re.search(r"^found vocab_size = \d+ \(inside .*meta\.json\)$", out, re.MULTILINE)
    assert re.search(r"^number of parameters: 0\.00M$", out, re.MULTILINE)
    steps = re.findall(r"^step (\d+): train loss \d\.\d{4}, val loss \d\.\d{4}$", out, re.MULTILINE)
    assert steps == ["0", "2", "4"]
    lines = re.findall(r"^iter (\d+): loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a$", out, re.MULTILINE)
    assert lines == ["0", "1", "2", "3", "4"]  # max_iters is the last iteration, as in nanoGPT
    assert re.search(r"^whole validation split: val loss \d\.\d{4} over \d+ windows of 16$", out, re.MULTILINE)

    out_dir = tmp_path / "out"
    assert checkpoints(out_dir) == ["ckpt-000002", "ckpt-000004"]
    (run,) = rows(out_dir, "run")
    assert run["config"]["n_embd"] == 16
    assert run["model"]["block_size"] == 16
    assert [row["step"] for row in rows(out_dir, "step")] == [0, 1, 2, 3, 4]
    assert all(row["tokens_per_s"] == pytest.approx(64e3 / row["ms"]) for row in rows(out_dir, "step"))
    assert rows(out_dir, "step")[3]["lr"] == schedules.learning_rate(3, cli.parse(Pretrain, flags, PRESETS))
    *evals, whole = rows(out_dir, "eval")
    assert [row["step"] for row in evals] == [0, 2, 4]
    assert evals[-1]["train_loss"] < evals[0]["train_loss"]
    assert whole["whole_val_loss"] == pytest.approx(evals[-1]["val_loss"], abs=0.3)


def test_a_given_peak_gives_an_mfu(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(pretrain.main, [*flags, "--peak_tflops=0.01", "--max_iters=7"]) == 0
    shown = re.findall(r"^iter \d: .* mfu (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert shown[:5] == ["n/a"] * 5  # the first iterations warm up
    assert all(re.fullmatch(r"\d+\.\d\d%", value) for value in shown[5:])


def test_evaluation_time_is_not_iteration_time(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def taking(seconds: float, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*arguments: object) -> torch.Tensor:
            clock[0] += seconds
            return function(*arguments)

        return run

    monkeypatch.setattr(trainer, "mean_loss", taking(3600, evaluate))
    monkeypatch.setattr(Step, "__call__", taking(1, Step.__call__))
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert cli.run(pretrain.main, [*flags, "--eval_interval=1", "--log_interval=2"]) == 0
    shown = re.findall(r"^iter (\d): .* time (.*)ms", capsys.readouterr().out, re.MULTILINE)
    assert shown == [("0", "1000.00"), ("2", "1000.00"), ("4", "1000.00")]


def test_checkpoints_only_when_better_unless_always(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = itertools.chain.from_iterable((loss, loss) for loss in (4.0, 3.0, 3.5, 2.0))  # train and val
    monkeypatch.setattr(trainer, "mean_loss", lambda *_: torch.tensor(next(losses)))
    fixed = [*flags, "--eval_interval=1", "--max_iters=3", "--whole_val=False", "--always_save_checkpoint=False"]
    assert cli.run(pretrain.main, fixed) == 0
    assert checkpoints(tmp_path / "out") == ["ckpt-000001", "ckpt-000003"]


def test_a_run_that_replaces_another_says_so_before(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [*flags, "--max_iters=2"]
    for more in ([], ["--eval_only"], ["--resume=latest"]):
        assert cli.run(pretrain.main, [*flags, *more]) == 0 and " has a run of" not in capsys.readouterr().out
    (last,) = checkpoints(tmp_path / "out")
    assert cli.run(pretrain.main, flags) == 0
    out = capsys.readouterr().out
    said = f"{tmp_path / 'out'} has a run of {int(last[5:])} steps, whose checkpoints this one replaces when it saves; "
    assert out.index(f"{said}--resume=latest goes on with it") < out.index("iter 0")
    (tmp_path / "out" / last).rename(tmp_path / "out" / "ckpt-000009")  # as of a longer run, whose loss was lower
    assert cli.run(pretrain.main, flags) == 0 and checkpoints(tmp_path / "out") == [last]


def test_eval_only_evaluates_once_and_trains_nothing(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(pretrain.main, [*flags, "--eval_only=True"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^step 0: ", out, re.MULTILINE)) == 1
    assert "iter " not in out
    assert checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_trains_on_a_cpu(
    flags: list[str], dtype: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(pretrain.main, [*flags, f"--dtype={dtype}", "--max_iters=20", "--lr_decay_iters=20"]) == 0
    assert f"dtype: {dtype}, asked for" in capsys.readouterr().out
    first, *_, last, _ = rows(tmp_path / "out", "eval")
    assert last["val_loss"] < first["val_loss"] - 0.3


def test_gpt2_weights_from_a_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=70)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    flags = [*TINY, f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}", f"--init_from={tmp_path / 'gpt2'}"]
    assert cli.run(pretrain.main, flags) == 0
    assert "Initializing from pretrained weights" in capsys.readouterr().out
    (run,) = rows(tmp_path / "out", "run")
    assert (run["model"]["n_embd"], run["model"]["block_size"], run["model"]["bias"]) == (32, 16, True)


def test_wandb_is_sent_nanogpts_five_keys(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.run(pretrain.main, [*flags, "--wandb_log=True"]) == 2
    assert "error: --wandb_log=True needs the package wandb" in capsys.readouterr().err
    started, sent = [], []
    stub = types.SimpleNamespace(init=lambda **settings: started.append(settings), log=sent.append)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    assert cli.run(pretrain.main, [*flags, "--wandb_log=True", "--peak_tflops=1", "--max_iters=8"]) == 0
    assert (started[0]["project"], started[0]["name"], started[0]["config"]["n_layer"]) == ("owt", "gpt2", 1)
    assert [row["iter"] for row in sent] == [0, 2, 4, 6, 8]
    assert set(sent[-1]) == {"iter", "train/loss", "val/loss", "lr", "mfu"}


def test_a_preset_that_logs_to_wandb_runs_without_it_and_says_so(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.run(pretrain.main, ["gpt2", *flags, "--max_iters=1"]) == 0
    assert "wandb_log: no, wandb is not installed" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "start", lambda *_: pytest.fail("a model is made first"))
    assert cli.run(pretrain.main, ["gpt2", *flags, "--max_iters=1", "--wandb_log=True"]) == 2


# ---- documents and vocabularies of byte pairs


@pytest.fixture
def packed(tmp_path: Path, text: str) -> list[str]:
    """Flags of a run on documents of bytes: 256 tokens and BOS, as train.prepare writes them."""
    tokenizer = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {"<|bos|>": 256})
    folder = tmp_path / "data" / "bytes"
    folder.mkdir(parents=True)
    for split, lines in (("train", text.splitlines()[:300]), ("val", text.splitlines()[300:340])):
        ids = [token for line in lines for token in tokenizer.encode_document(line[:25])]
        (folder / f"{split}.bin").write_bytes(torch.tensor(ids, dtype=torch.int16).numpy().tobytes())
    meta = {"vocab_size": 257, "tokenizer": tokenizer.to_json(), "fingerprint": tokenizer.fingerprint, "files": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return [
        *TINY, "--dataset=bytes", "--block_size=64", "--documents=True", f"--data_dir={tmp_path / 'data'}",
        f"--out_dir={tmp_path / 'out'}", "--dtype=float32",
    ]  # fmt: skip


def test_documents_are_packed_and_resume_exactly(
    packed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch, of evaluations and of the whole split too, says where its documents start."""
    forward, seen = GPT.forward, []

    def watched(self: GPT, x: torch.Tensor, y: torch.Tensor, cu_seqlens: torch.Tensor, **how: str) -> torch.Tensor:
        assert torch.equal(cu_seqlens, document_starts(x, 256)) and len(cu_seqlens) > 1 + len(x)
        seen.append(self.training)
        return forward(self, x, y, cu_seqlens, **how)

    monkeypatch.setattr(GPT, "forward", watched)
    whole = f"--out_dir={tmp_path / 'whole'}"
    assert cli.run(pretrain.main, [*packed, whole, "--max_iters=8", "--eval_interval=8"]) == 0
    assert any(seen) and not all(seen)
    assert cli.run(pretrain.main, [*packed, "--max_iters=3"]) == 0
    assert cli.run(pretrain.main, [*packed, "--max_iters=8", "--resume=latest"]) == 0
    found, expected = checkpoint.load(tmp_path / "out"), checkpoint.load(tmp_path / "whole")
    assert found.step == 8 and found.meta["batches"] == expected.meta["batches"]
    assert all(torch.equal(tensor, expected.model[name]) for name, tensor in found.model.items())
    other = [*packed, "--resume=latest", "--documents=False"]
    capsys.readouterr()
    assert "was trained with --documents=True" in refusal(other, capsys)


def test_a_refused_update_of_documents_is_kept(
    packed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = GPT.forward
    nan = lambda self: math.nan if self.training else 1.0
    monkeypatch.setattr(GPT, "forward", lambda self, *batch, **how: forward(self, *batch, **how) * nan(self))
    assert "not a number" in refusal([*packed, "--async_save=True"], capsys)
    (batch,) = checkpoint.load(tmp_path / "out" / "post-mortem").meta["refused"]["batches"]
    assert [part.shape for part in batch[:2]] == [(4, 64)] * 2 and torch.equal(
        batch[2], document_starts(batch[0], 256).int()
    )


def test_characters_have_no_documents(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "begins a document; prepare it with a BPE tokenizer" in refusal([*flags, "--documents=True"], capsys)


def test_a_vocabulary_of_byte_pairs_is_rounded_up(
    packed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """257 tokens take 320 rows; no target is among the padding, nothing is sampled from it, no export has it."""
    assert cli.run(pretrain.main, packed) == 0
    assert "vocab_size: 320, 257 rounded up" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "out")
    assert saved.meta["model"]["vocab_size"] == 320 == len(saved.model["transformer.wte.weight"])
    assert len(checkpoint.load(tmp_path / "out").model["lm_head.weight"]) == 320

    model, tokenizer = hf.load(tmp_path / "out"), hf.load_tokenizer(tmp_path / "out")
    tokens = torch.randint(257, (2, 64))
    exported = hf.load(hf.save(model, tmp_path / "exported", tokenizer))
    assert exported.config.vocab_size == 257
    torch.testing.assert_close(exported.logits(tokens), model.logits(tokens)[..., :257])
    with torch.no_grad():  # the padding is all that the model would say
        model.lm_head.weight[257:] = 100 * model.hidden(tokens)[0, -1]
    assert model.logits(tokens)[0, -1].argmax() >= 257
    engine = Engine(model, slots=1, tokenizer=tokenizer)
    request = engine.submit(tokens[0, :8].tolist(), Sampling(max_tokens=20, seed=1))
    while engine.busy:
        engine.step()
    assert len(request.tokens) == 20 and max(request.tokens) < 257

    exact = [*packed, "--vocab_multiple=1", f"--out_dir={tmp_path / 'exact'}"]
    assert cli.run(pretrain.main, exact) == 0
    assert checkpoint.load(tmp_path / "exact").meta["model"]["vocab_size"] == 257
    train = tmp_path / "data" / "bytes" / "train.bin"
    train.write_bytes(train.read_bytes() + (300).to_bytes(2, "little"))
    capsys.readouterr()
    assert "token id 300, but vocab_size is 257" in refusal(packed, capsys)
    assert build.rounded(50257, None, 64) == 50304 and build.rounded(65, {"kind": "char"}, 64) == 65


# ---- mistakes: one line, exit code 2, nothing lost


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(pretrain.main, flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_data_is_refused(flags: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = data / "tiny" / "train.bin"
    whole = train.read_bytes()
    assert "no data set in" in refusal([*flags, "--dataset=nowhere"], capsys)
    assert "too few for block_size 100000" in refusal([*flags, "--block_size=100000"], capsys)
    train.write_bytes(whole[:-2])
    assert "train.bin is damaged: it has" in refusal(flags, capsys)
    train.write_bytes(whole[:-2] + b"\xff\xff")
    assert "train.bin is damaged" in refusal(flags, capsys)
    meta = data / "tiny" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "files": {}}))
    assert "token id 65535, but vocab_size is" in refusal(flags, capsys)
    train.unlink()
    assert "no token file" in refusal(flags, capsys)
    meta.write_text("{}")
    assert "meta.json" in refusal(flags, capsys)


def test_bad_places_devices_and_names_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("kept")
    assert "cannot write there" in refusal([*flags, f"--out_dir={tmp_path / 'file' / 'out'}"], capsys)
    assert (tmp_path / "file").read_text() == "kept"
    assert "there is no CUDA GPU here" in refusal([*flags, "--device=cuda"], capsys)
    assert "did you mean shakespeare_char?" in refusal(["shakespear_char", *flags], capsys)
    assert "no such folder" in refusal([*flags, "--init_from=gpt3"], capsys)
    assert "no checkpoint in" in refusal([*flags, "--init_from=resume"], capsys)
    assert "n_embd" in refusal([*flags, "--n_head=3"], capsys)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoints(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(pretrain.main, flags) == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").glob("ckpt-*/*")}
    forward = GPT.forward
    nan = lambda self: math.nan if self.training else 1.0
    monkeypatch.setattr(GPT, "forward", lambda self, *batch, **how: forward(self, *batch, **how) * nan(self))
    capsys.readouterr()
    assert "the loss is not a number at iteration 0; lower --learning_rate" in refusal(flags, capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("ckpt-*/*")} == kept


def test_no_cpp_compiler_is_one_line_before_any_work(flags: list[str], tmp_path: Path) -> None:
    """In a process of its own: torch remembers the compiler that it found."""
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(empty)}
    command = [sys.executable, "-m", "train.pretrain", *flags, "--compile=True"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and "iter 0" not in done.stdout
    assert done.stderr.splitlines() == [
        "error: --compile=True needs a C++ compiler on a CPU, and there is none; install g++, or give --compile=False"
    ]
