"""Flags and arguments as nobody should give them: every command ends in one line, no op is wrong in silence.

The long form is `make chaos`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # before an alarm could end its import half way
from torch import Tensor

import kernels
from gptfast import cli
from kernels.proof.interpret import OutOfBounds, Overflow, Race
from tests.hostile import HEADROOM, little_memory

# ---- flags of every command; what each is given besides ends it before it works

NOTHING = "no_such_name"
COMMANDS: dict[str, list[str]] = {  # a word after the module tells two of its forms apart
    "train.pretrain": [f"--dataset={NOTHING}"], "train.speedrun": ["cpu", f"--dataset={NOTHING}", "--device=cpu"],
    "train.sft": [f"--init_from={NOTHING}"], "train.rl": [f"--init_from={NOTHING}"], "train.chat": ["--out_dir=."],
    "train.prepare": [NOTHING], "train.tokenizer": ["train", f"--source={NOTHING}"],
    "train.evaluate": [f"--text={NOTHING}", "--device=cpu"], "train.plan": [],
    "gptfast.sample": [f"--out_dir={NOTHING}"], "gptfast.hf.__main__": ["export", NOTHING, "--to=x"],
    "gptfast.report.__main__": [NOTHING], "bench.mfu": [], "bench.compare": [NOTHING, NOTHING],
    "bench.plots": [f"--out={NOTHING}"], "train.scaling": ["--out=/proc/no_folder"],
    "bench.ops": [f"--only={NOTHING}", "--out=out"], "bench.optim": [f"--models={NOTHING}", "--out=out"],
    "bench.host": [f"--ops={NOTHING}", "--out=out"], "bench.decode": [f"--models={NOTHING}", "--out=out"],
    "bench.profile": [f"--models={NOTHING}", "--out=out"], "bench.speedrun": [f"--preset={NOTHING}", "--out=out"],
    "bench.history": [f"--root={NOTHING}"], "bench.tune": [NOTHING, "--out=out"],
    "bench.cpu": ["--out=/proc/no_folder/x"] * 2, "bench.predict": [f"--model={NOTHING}"],
    "train.prepare chat": ["chat", f"--source={NOTHING}"], "train.tokenizer eval": ["eval", f"--source={NOTHING}"],
    "gptfast.hf.__main__ import": ["import", NOTHING, "--out_dir=x"],
    "gptfast.report.__main__ card": ["--card", NOTHING, NOTHING],
    "gptfast.chat.__main__": [f"--out_dir={NOTHING}", "--device=cpu"],
    "gptfast.serve.__main__": [f"--out_dir={NOTHING}", "--device=cpu", "--port=0"],
    "bench.model": [f"--models={NOTHING}", "--out=out"], "bench.peaks": ["--out=/proc/no_folder/x"] * 2,
    "bench.serve": [f"--models={NOTHING}", "--out=out"], "bench.deep": [f"--op={NOTHING}"], "bench.warm": [],
    "bench.__main__": [f"--only={NOTHING}"] * 2, "kernels.__main__": [f"--gpu={NOTHING}"] * 2,
    "kernels.proof.aot": [f"--op={NOTHING}"] * 2, "kernels.proof.traffic": [f"--op={NOTHING}"] * 2,
}  # fmt: skip
VALUES = [
    "", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e999", "1e-320", "1e300", "99999999999999999999", "9" * 5000,
    "0x10", "1_0", "a", "é", "../..", "/dev/full", "None", "True", "false", "[1]", "{}", "x" * 5000, "cuda", "cuda:99",
    "mps", "meta", "a,b,,c", "-", "--", "%s%n", "1.5", "gpt2,gpt2", "\n", "\x1b[31m",
]  # fmt: skip
SECONDS = 15  # after which a command that still runs was given what it could take


class TooLong(BaseException):
    """It works, and need not end."""


def flags_of(module: str) -> list[str]:
    """The names of its flags, from its --help."""
    said = io.StringIO()
    argv = [*COMMANDS[module][:1], "--help"] if module.startswith("gptfast.hf") else ["--help"]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(module.split(" ")[0]).main(argv)
    return sorted(set(re.findall(r"--([a-z][a-z0-9_]+)", said.getvalue())) - {"help"})


def mutated_argv(module: str, names: list[str], draw: random.Random) -> list[str]:
    argv = list(COMMANDS[module])
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name, value = draw.choice(names or ["x"]), draw.choice(VALUES)
        kind = draw.random()
        if kind < 0.75:
            argv.insert(draw.randrange(len(argv) + 1), f"--{name}={value}")
        elif kind < 0.85:
            argv += [f"--{name}", value]
        elif kind < 0.95:
            argv.append(draw.choice([f"--{name[:-1]}", f"--{name}x={value}", f"-{name}", value]))
        else:
            argv = argv[1:]
    return argv


def ends(module: str, argv: list[str]) -> str:
    """How the command ended: ok, refused, or working; raises whatever else it raises."""

    def late(*_: object) -> None:
        raise TooLong

    main = importlib.import_module(module.split(" ")[0]).main
    said = io.StringIO()
    room = (4 if module.startswith("bench") else 1) * HEADROOM  # a benchmark that runs takes what it measures
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), little_memory(room):
            code = cli.run(main, argv)
    except TooLong:
        return "working"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert code in (0, 1, 2), (code, said.getvalue())
    if code == 2:
        last = said.getvalue().rstrip("\n").splitlines()[-1]
        assert "error: " in last and len(last) < 2000 + len("".join(argv)), last
    return "ok" if code == 0 else "refused"


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_mutated_flags_end_in_one_line(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chaos: Callable[[int, int], int]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in_the_way").touch()
    draw, names, verdicts = random.Random(module), flags_of(module), dict[str, int]()
    assert names
    for _ in range(chaos(3, 100)):
        argv = mutated_argv(module, names, draw)
        try:
            verdict = ends(module, argv)
        except BaseException as error:
            raise AssertionError(f"{module} {argv!r}: {type(error).__name__}: {error}") from error
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    assert verdicts.get("refused")
    if chaos(0, 1):
        print(f"{module}: {verdicts}")


# ---- arguments of the ops

ODD: list[Any] = [None, 0, -1, 1.5, float("nan"), float("inf"), "x", (), [], True, 2**40, object()]
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError)


def mutated(value: Any, draw: random.Random) -> tuple[str, Any]:
    """Another value in the place of this one: (what was done, it)."""
    if not isinstance(value, Tensor) or draw.random() < 0.15:
        odd = draw.choice(ODD)
        return f"{odd!r}", odd
    ways: dict[str, Callable[[], Any]] = {
        "meta": lambda: value.to("meta"), "float64": lambda: value.double(), "int64": lambda: value.long(),
        "bool": lambda: value.bool(), "complex": lambda: value.to(torch.complex64), "float16": lambda: value.half(),
        "turned": lambda: value.mT.contiguous().mT if value.dim() > 1 else value.flip(0),
        "wider": lambda: value[..., None], "flat": lambda: value.flatten(), "fewer": lambda: value[:-1],
        "shorter": lambda: value[..., :-1], "empty": lambda: value[:0], "scalar": lambda: value.flatten()[:1].sum(),
        "expanded": lambda: value[:1].expand(value.shape), "strided": lambda: torch.cat([value, value], -1)[..., ::2],
        "nan": lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else value - 1000,
        "huge": lambda: value * 10**6, "sparse": lambda: value.to_sparse(), "list": lambda: value.tolist(),
        "needs grad": lambda: value.clone().requires_grad_(value.is_floating_point()),
    }  # fmt: skip
    name = draw.choice(list(ways))
    try:
        return name, ways[name]()
    except REFUSALS:
        return "as it is", value


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [each for each in result if isinstance(each, Tensor)]


def run_op(function: Callable[..., Any], arguments: list[Any]) -> list[Tensor] | str:
    """Its results, or the name of what it raised."""
    try:
        with little_memory():
            return outputs(function(*[each.clone() if isinstance(each, Tensor) else each for each in arguments]))
    except (OutOfBounds, Race, Overflow):
        raise
    except REFUSALS as error:
        return type(error).__name__


@pytest.mark.parametrize("name", sorted(kernels.OPS))
def test_mutated_arguments_are_refused_or_right(name: str, chaos: Callable[[int, int], int]) -> None:
    """No access outside the tensors, no crash; and where reference and kernel both take it, they agree."""
    op, draw = kernels.OPS[name], random.Random(name)
    reference = getattr(kernels.load("reference"), name)
    interpreted = getattr(kernels.load("interpret"), name)
    verdicts = {"refused": 0, "right": 0}
    dims = min(op.parity, key=lambda dims: sum(v for v in dims.values() if isinstance(v, int)))
    for _ in range(chaos(6, 100)):
        arguments = list(op.inputs(**dims, dtype=torch.float32, device="cpu"))
        place = draw.randrange(len(arguments))
        how, changed = mutated(arguments[place], draw)
        if (name, how) == ("decode_attention", "nan"):  # its reference is torch's own operator, which makes 0 of NaN
            how, changed = "as it is", arguments[place]
        arguments[place] = changed
        where = f"{name}, argument {place}: {how}"
        try:
            found = run_op(interpreted, arguments)
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        if isinstance(found, str):
            verdicts["refused"] += 1
            continue
        expected = run_op(reference, arguments)
        assert not isinstance(expected, str), f"{where}: the kernel takes what the reference refuses ({expected})"
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape, where
            if ours.device.type == "meta" or not ours.is_floating_point():
                continue
            scale = theirs.double().nan_to_num().abs().max() if theirs.numel() else 1.0
            close = torch.isclose(ours.double(), theirs.double(), rtol=0.02, atol=0.02 * float(scale), equal_nan=True)
            assert close.all(), where
        verdicts["right"] += 1
    assert sum(verdicts.values()) == chaos(6, 100)
    if chaos(0, 1):
        print(f"{name}: {verdicts}")
