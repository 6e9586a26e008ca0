"""The command line: what is accepted, what is refused, and how a refusal reads."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from gptfast import cli, runtime
from gptfast.chat.__main__ import ChatConfig
from gptfast.errors import UserError, nearest
from gptfast.sample import Sample
from gptfast.serve.__main__ import Serve
from train.config import Pretrain
from train.sft import Sft


@dataclass(frozen=True)
class Flags:
    learning_rate: float = 6e-4  # highest learning rate
    dropout: float = 0.1
    max_iters: int = 10
    compile: bool = True
    device: str = "cuda"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    n_kv_head: int | None = None


PRESETS = {"train_shakespeare_char": Flags(max_iters=5000), "small": Flags(dropout=0.5)}


def parse(*argv: str) -> Flags:
    return cli.parse(Flags, argv, PRESETS)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate", "1"], "learning_rate", 1.0),
        (["--learning-rate=1e-3"], "learning_rate", 1e-3),
        (["--learning_rate", "-1"], "learning_rate", -1.0),
        (["--dropout=0"], "dropout", 0.0),
        (["--compile=False"], "compile", False),
        (["--compile=false"], "compile", False),
        (["--compile", "False"], "compile", False),
        (["--compile=False", "--compile"], "compile", True),
        (["--device=a=b"], "device", "a=b"),
        (["--device="], "device", ""),
        (["--device=--x y\n"], "device", "--x y\n"),
        (["--device=123"], "device", "123"),
        (["--norm=rmsnorm"], "norm", "rmsnorm"),
        (["--n_kv_head=2"], "n_kv_head", 2),
        (["--n_kv_head=2", "--n_kv_head=None"], "n_kv_head", None),
        (["--max_iters=1", "--max_iters=2"], "max_iters", 2),
        (["train_shakespeare_char"], "max_iters", 5000),
        (["shakespeare_char"], "max_iters", 5000),
        (["config/train_shakespeare_char.py"], "max_iters", 5000),
        (["--max_iters=7", "shakespeare_char"], "max_iters", 7),
        (["shakespeare_char", "--max_iters=7"], "max_iters", 7),
        (["small", "--compile"], "dropout", 0.5),
    ],
)
def test_accepted(argv: list[str], field: str, value: object) -> None:
    parsed = getattr(parse(*argv), field)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate=1"], "unknown flag --lerning_rate; did you mean --learning_rate?"),
        (["--num-iterations=5"], "unknown flag --num-iterations; did you mean --max_iters?"),
        (["--lr", "1"], "unknown flag --lr; did you mean --learning_rate?"),
        (["--device-type=cpu"], "unknown flag --device-type; did you mean --device?"),
        (["-x", "5"], "unknown flag -x; flags are typed --key=value"),
        (["-learning_rate=1"], "unknown flag -learning_rate; flags are typed --key=value"),
        (["--learning_rate=fast"], "--learning_rate=fast: expected float"),
        (["--max_iters=1.5"], "--max_iters=1.5: expected int"),
        (["--max_iters=1e3"], "--max_iters=1e3: expected int"),
        (["--max_iters="], "--max_iters=: expected int"),
        (["--compile=2"], "--compile=2: expected True or False"),
        (["--norm=batchnorm"], "--norm=batchnorm: expected layernorm or rmsnorm"),
        (["--n_kv_head=x"], "--n_kv_head=x: expected int | None"),
        (["--max_iters"], "--max_iters needs a value: --max_iters=int"),
        (["--max_iters", "--compile"], "--max_iters needs a value: --max_iters=int"),
        (["smal"], "unknown preset smal; did you mean small?"),
        (["config/zebra.py"], "unknown preset config/zebra.py; known: shakespeare_char, small"),
        (["shakespere_char"], "unknown preset shakespere_char; did you mean shakespeare_char?"),
        (["small", "shakespeare_char"], "small shakespeare_char: give one name, not 2"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("config_type", "argv", "meant"),
    [
        (Sft, ["-i", "base"], "the checkpoint is named by --init_from=FOLDER"),
        (ChatConfig, ["-i", "sft"], "the checkpoint is named by --out_dir=FOLDER"),
        (ChatConfig, ["-p", "Hi"], "did you mean --prompt?"),
        (ChatConfig, ["-t=0.5"], "did you mean --temperature?"),
        (ChatConfig, ["--max-new-tokens=5"], "did you mean --max_tokens?"),
        (Sample, ["--source", "sft"], "the checkpoint is named by --out_dir=FOLDER"),
        (Sample, ["--prompt=x"], "did you mean --start?"),
        (Serve, ["-g", "d12"], "the checkpoint is named by --out_dir=FOLDER"),
        (Serve, ["-p", "80"], "did you mean --port?"),
        (Sft, ["--model-tag=d12"], "the checkpoint is named by --init_from=FOLDER"),
        (Pretrain, ["--model-tag=d12"], "the checkpoint is named by --out_dir=FOLDER"),
        (Sft, ["--mmlu-epochs=3"], "did you mean --mixture?"),
        (Pretrain, ["--eval-every=5"], "did you mean --eval_interval?"),
        (Pretrain, ["--run=dummy"], "did you mean --wandb_run_name?"),
        (Pretrain, ["--max-seq-len=512"], "did you mean --block_size?"),
        (Pretrain, ["--device-batch-size=8"], "did you mean --batch_size?"),
    ],
)
def test_spellings_of_nanochats(config_type: type, argv: list[str], meant: str) -> None:
    with pytest.raises(UserError) as error:
        cli.parse(config_type, argv)
    assert str(error.value) == f"unknown flag {argv[0].partition('=')[0]}; {meant}"


def test_no_presets_and_positional() -> None:
    with pytest.raises(UserError, match="unexpected argument word"):
        cli.parse(Flags, ["word"])
    assert cli.parse(Flags, ["word"], positional="device").device == "word"
    assert cli.parse(Flags, ["word", "--device=cpu"], positional="device").device == "cpu"


def test_typed_tells_a_choice_from_a_default() -> None:
    assert cli.typed(["small", "--max-iters", "3", "--compile"], Flags) == {"max_iters": "3", "compile": "True"}


def test_help_lists_every_flag_with_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("small", "--help")
    assert end.value.code == 0
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())  # unboxed, wherever the terminal wraps
    assert "--learning_rate FLOAT highest learning rate (default: 0.0006)" in words
    assert "--dropout FLOAT (default: 0.5)" in words
    for field in dataclasses.fields(Flags):
        assert f"--{field.name} " in words
    assert "Presets, typed as a bare word: train_shakespeare_char, small" in words


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> None:
        raise UserError(f"no file {argv[0]}; make it")

    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    def break_down(argv: list[str]) -> None:
        raise ValueError("a defect of ours")

    assert cli.run(lambda argv: None, []) == 0
    assert cli.run(lambda argv: 3, []) == 3
    assert cli.run(fail, ["x"]) == 2
    assert capsys.readouterr().err == "error: no file x; make it\n"
    assert cli.run(interrupt, []) == 130
    with pytest.raises(ValueError, match="a defect of ours"):  # a traceback is right for what the user cannot mend
        cli.run(break_down, [])


def test_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choose_device("cpu", typed=True) == "cpu"
    assert capsys.readouterr().out == ""
    assert runtime.choose_device("cuda", typed=False) == "cpu"
    assert capsys.readouterr().out.startswith("device: cpu, because there is no CUDA GPU here")
    with pytest.raises(UserError, match=r"--device=cuda: there is no CUDA GPU here; use --device=cpu"):
        runtime.choose_device("cuda", typed=True)
    with pytest.raises(UserError, match="unknown device"):
        runtime.choose_device("gpu", typed=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert runtime.choose_device("cuda:0", typed=True) == "cuda:0"
    with pytest.raises(UserError, match="GPUs here: 1; use --device=cuda:0"):
        runtime.choose_device("cuda:1", typed=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.choose_device("cuda:1", typed=True) == "cuda:1"
    assert runtime.made_current("cuda:2").index == 2 and runtime.made_current("cpu").type == "cpu"
    assert current == [torch.device("cuda:0"), torch.device("cuda:1")]  # Triton launches on the current one


def test_dtype_and_kernels() -> None:
    assert runtime.choose_dtype("float16", "cpu") == (torch.float16, "asked for")
    dtype, why = runtime.choose_dtype("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16)
    assert why.startswith("the CPU has")
    assert runtime.choose_ops("auto", "cpu").chosen["layernorm"][0] == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--kernels=triton: .*no CUDA device"):
            runtime.choose_ops("triton", "cpu")


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--n=--", "--n=--: -- is no value"), ("a\nb\x1b[31m", "unexpected argument a\\nb\\x1b[31m;")],
)
def test_an_error_is_one_line_whatever_was_typed(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda argv: cli.parse(runtime_config(), argv), [argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def runtime_config() -> type:
    return dataclasses.make_dataclass("Config", [("n", int, 1)], frozen=True)


def test_the_nearest_of_several_words_may_be_meant_by_its_first() -> None:
    cards = ["B100 SXM", "H100 PCIe", "H100 SXM", "H200 SXM"]
    assert nearest("H1000", cards) == "; did you mean H100 PCIe?"
    assert nearest("H100 SMX", cards) == "; did you mean H100 SXM?"
    assert nearest("zebra", cards) == "; known: B100 SXM, H100 PCIe, H100 SXM, H200 SXM"
