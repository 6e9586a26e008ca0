"""The command: from text to a trained model to text again, without the data set."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptfast import cli, sample
from gptfast.runtime import others_running
from train import pretrain
from train.prepare import prepare

PANGRAM = "the quick brown fox jumps over a lazy dog. "


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned one sentence by heart; its data set is gone."""
    folder = tmp_path_factory.mktemp("fox")
    (folder / "text.txt").write_text(PANGRAM * 100)
    prepare("fox", folder / "data", folder / "text.txt")
    flags = [
        "--device=cpu", "--compile=False", "--block_size=16", "--batch_size=16", "--gradient_accumulation_steps=1",
        "--n_layer=1", "--n_head=2", "--n_embd=32", "--max_iters=120", "--eval_interval=120", "--eval_iters=2",
        "--warmup_iters=5", "--lr_decay_iters=120", "--learning_rate=1e-2", "--dataset=fox", "--log_interval=50",
        "--dtype=float32", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}",
    ]  # fmt: skip
    assert cli.run(pretrain.main, flags) == 0
    shutil.rmtree(folder / "data")
    return folder / "out"


def run(out_dir: Path, *flags: str) -> int:
    return cli.run(sample.main, [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *flags])


def texts(printed: str) -> list[str]:
    """The samples in what was printed."""
    return printed.split("number of parameters: ")[1].split("\n", 1)[1].split(f"\n{sample.SEPARATOR}\n")[:-1]


def test_a_trained_model_says_what_it_learned(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out_dir, "--start=the quick", "--num_samples=2", "--max_new_tokens=40", "--temperature=0") == 0
    expected = (PANGRAM * 3)[: len("the quick") + 40]  # longer than block_size, so the window slides
    assert texts(capsys.readouterr().out) == [expected, expected]


def test_a_seed_repeats_and_another_differs(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--start=a ", "--num_samples=3", "--max_new_tokens=30", "--temperature=3")
    drawn = []
    for seed in (1, 1, 2):
        assert run(out_dir, *flags, f"--seed={seed}") == 0
        drawn.append(texts(capsys.readouterr().out))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert all(text.startswith("a ") and len(text) == 32 for text in drawn[0])


def test_a_prompt_from_a_file(out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("fox jum")
    assert (
        run(
            out_dir,
            f"--start=FILE:{tmp_path / 'prompt.txt'}",
            "--num_samples=1",
            "--max_new_tokens=4",
            "--temperature=0",
        )
        == 0
    )
    assert texts(capsys.readouterr().out) == ["fox jumps o"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--start=dögs", "character 'ö'"),
        ("--start=\n", r"character '\n'"),
        ("--start=", "--start is empty"),
        ("--start=FILE:/nowhere/prompt", "--start=FILE:/nowhere/prompt: cannot read it"),
        ("--out_dir=/nowhere", "no checkpoint in /nowhere"),
        ("--init_from=gpt5", "gpt5: no such folder"),
        ("--num_samples=0", "--num_samples=0: must be at least 1"),
        ("--temperature=-1", "--temperature=-1: must not be negative"),
        ("--top_p=0", "--top_p=0.0: must be above 0"),
        ("--repetition_penalty=0", "--repetition_penalty=0.0: must be above 0"),
        ("--quantize=int3", "--quantize=int3: expected none or int8"),
        ("--top_x=1", "unknown flag --top_x; did you mean --top_"),
    ],
)
def test_mistakes_are_one_line(out_dir: Path, flag: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out_dir, flag) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_defaults_are_nanogpts() -> None:
    defaults = sample.Sample()
    assert (defaults.init_from, defaults.out_dir, defaults.start) == ("resume", "out", "\n")
    assert (defaults.num_samples, defaults.max_new_tokens, defaults.temperature) == (10, 500, 0.8)
    assert (defaults.top_k, defaults.seed, defaults.device, defaults.compile) == (200, 1337, "cuda", False)


def test_a_sample_ends_before_the_stop_text(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--start=the ", "--num_samples=1", "--max_new_tokens=40", "--temperature=0")
    assert run(out_dir, *flags, "--stop=jumps over") == 0
    assert texts(capsys.readouterr().out) == ["the quick brown fox "]


def test_eight_bits_say_the_same(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--start=the ", "--num_samples=1", "--max_new_tokens=30", "--temperature=0", "--quantize=int8")
    assert run(out_dir, *flags) == 0
    printed = capsys.readouterr().out
    assert "weights: int8, asked for" in printed
    assert texts(printed) == [PANGRAM[:34]]


def test_the_last_line_is_the_speed(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out_dir, "--start=the ", "--num_samples=2", "--max_new_tokens=5") == 0
    *_, last = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"time to first token: ([0-9.]+) ms, then ([0-9.]+) tokens/s", last)
    assert found is not None and all(float(number) > 0 for number in found.groups())


@pytest.mark.parametrize(("others", "turns"), [(0, None), (99, "1000")])
def test_on_a_busy_machine_the_command_bounds_its_threads_before_torch_loads(
    out_dir: Path, others: int, turns: str | None
) -> None:
    flags = [f"--out_dir={out_dir}", "--device=cpu", "--start=a ", "--num_samples=1", "--max_new_tokens=3"]
    program = (
        "import gptfast.runtime as r, os, runpy, sys\n"
        f"r.others_running = lambda: print('torch is loaded:', 'torch' in sys.modules) or {others}\n"
        f"sys.argv = ['sample', *{flags}]\n"
        "try: runpy.run_module('gptfast.sample', run_name='__main__', alter_sys=True)\n"
        "finally: print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("torch is loaded: False\n") and done.stdout.endswith(f"tokens/s\n{turns}\n")


def test_what_else_runs_is_what_the_system_says(tmp_path: Path) -> None:
    said = tmp_path / "loadavg"
    said.write_text("0.20 1.41 2.58 5/117 23540\n")
    assert others_running(said) == 4
    assert others_running(tmp_path / "nothing") == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
@pytest.mark.parametrize(("own", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_freed_memory_stays_with_the_process_unless_the_user_says_otherwise(own: dict[str, str], kept: bool) -> None:
    program = """
import ctypes, gptfast.runtime
gptfast.runtime.set_up_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(2**24)
libc.free(block)
(heap,) = [line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n")]
low, high = (int(end, 16) for end in heap.split("-"))
print(low <= block < high)  # not mapped for itself, and not given back
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | own
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{kept}\n"
