"""Every command that writes, twice at once in one place, and interrupted at any moment: whole results, one line each.

The long form is `make chaos`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kernels
from gptfast import checkpoint, hf
from gptfast.chat.conversation import SPECIAL_TOKENS
from gptfast.config import PRESETS
from gptfast.data import load_tokens
from gptfast.hf import gguf
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer, CharTokenizer, load_bpe
from tests.test_aside import model
from train.build import describe_data

ROOT = Path(__file__).parents[1]
OPS = kernels.load("reference")
BYTES = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {"<|bos|>": 256})
WORDS = ("the quick brown fox jumps over the lazy dog\n", "pack my box with five dozen liquor jugs\n")

MODULES = (
    "train.prepare", "train.tokenizer", "train.pretrain", "train.evaluate", "gptfast.hf.__main__", "train.speedrun",
    "train.sft", "train.rl", "train.chat",
)  # fmt: skip

# Forks what it is told of, for speed: each child is a command as the shell would start it.
SERVER = """
import importlib, json, os, signal, sys, time, traceback
import gguf, tiktoken, tokenizers, torch, torch._dynamo, tyro
from gptfast import cli
for name in sys.argv[1:]:
    importlib.import_module(name)
torch.set_num_threads(1)
from train import chat, prepare
prepare.PYSTDLIB_CHARACTERS, chat.TEXT_CHARACTERS, chat.PER_TASK = 60_000, 20_000, 50  # seconds, not minutes
chat.TASKS = chat.MIXTURE = "addition"
for line in sys.stdin:
    job = json.loads(line)
    main = importlib.import_module(job["module"]).main
    children = []
    for argv, log, delay in zip(job["argv"], job["logs"], job["delays"]):
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            code = 99
            try:
                time.sleep(delay)
                code = cli.run(main, argv)
                sys.stdout.flush()
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    if job["interrupt"] is not None:
        time.sleep(job["interrupt"])
        os.kill(children[0], signal.SIGINT)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@dataclass(frozen=True)
class Writer:
    """A command that writes: its arguments, as one of two (0 or 1) that differ, and whether what is there is whole."""

    name: str
    module: str
    argv: Callable[[Path, int], list[str]]
    check: Callable[[Path], object]
    both: bool = False  # may succeed; else one is refused, unless the other has ended before
    goes_on: bool = True  # where it was interrupted; else it wants a new folder


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *MODULES], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    BYTES.save(folder / "bytes")
    for i, words in enumerate(WORDS):
        (folder / f"{i}.txt").write_text(words * 40)
        (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": f"{words}{n}"}) + "\n" for n in range(40)))
        hf.save(model(1.0 + i), folder / f"model{i}", CharTokenizer(("abcd", "wxyz")[i]))
        gguf.write(model(1.0 + i), folder / f"{i}.gguf", CharTokenizer(("abcd", "wxyz")[i]))
    return folder


def run(
    server: subprocess.Popen[str], writer: Writer, folder: Path, delays: list[float], interrupt: float | None = None
) -> list[int]:
    """The exit codes, each with at most one line of error."""
    logs = [str(folder / f"log{i}") for i in range(len(delays))]
    argv = [writer.argv(folder, i) for i in range(len(delays))]
    job = {"module": writer.module, "argv": argv, "logs": logs, "delays": delays, "interrupt": interrupt}
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    codes: list[int] = json.loads(server.stdout.readline())
    for code, log in zip(codes, logs, strict=True):
        said = Path(log).read_text()
        assert "Traceback" not in said, said
        assert code in ((0, 2) if interrupt is None else (0, 2, 130)), (code, said)
        assert code != 2 or sum(line.startswith("error: ") for line in said.splitlines()) == 1, said
    return codes


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".tmp-") or path.name == ".lock"]


def check_data(folder: Path) -> None:
    """The files are those of meta.json, by sha256."""
    size, _ = describe_data(folder)
    assert all(len(load_tokens(folder / f"{split}.bin", size)) for split in ("train", "val"))


def check_export(folder: Path) -> None:
    value = float(hf.load(folder, OPS).lm_head.weight[0, 0].detach())
    assert (value, hf.load_tokenizer(folder).chars) in ((1.0, "abcd"), (2.0, "wxyz"))  # type: ignore[attr-defined]


def check_import(folder: Path) -> None:
    saved = checkpoint.load(folder)
    value, chars = float(saved.model["lm_head.weight"][0, 0]), saved.meta["tokenizer"]["chars"]
    assert (value, chars) in ((1.0, "abcd"), (2.0, "wxyz")) and not saved.skipped


def check_run(folder: Path) -> None:
    """The weights are those of the run whose optimizer and settings stand beside them."""
    saved = checkpoint.load(folder)
    steps = {int(state["step"]) for state in saved.optimizer["state"].values()}
    assert steps == {saved.step} and not saved.skipped
    rates = {group["lr"] for group in saved.optimizer["param_groups"]}
    assert rates == {saved.meta["config"]["learning_rate"]}
    runs = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["what"] == "run"]
    assert saved.meta["config"]["seed"] in [row["config"]["seed"] for row in runs]


def check_stage(folder: Path, seed: str = "seed") -> None:
    """The newest checkpoint is whole, and of a run that the log knows."""
    saved = checkpoint.load(folder)
    assert not saved.skipped
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert saved.meta["config"][seed] in [row["config"][seed] for row in rows if row["what"] == "run"]


def check_chat(folder: Path) -> None:
    for stage in ("base", "sft", "rl"):
        check_stage(folder / stage)
    assert (folder / "report.md").read_text().startswith("# Report card")


TRAIN = [
    "--device=cpu", "--compile=False", "--block_size=8", "--batch_size=2", "--gradient_accumulation_steps=1",
    "--n_layer=1", "--n_head=1", "--n_embd=8", "--eval_iters=1", "--eval_interval=5", "--max_iters=20",
    "--decay_lr=False", "--log_interval=5", "--whole_val=False", "--dataset=tiny", "--warmup_iters=0",
]  # fmt: skip


STAGE = ["--device=cpu", "--compile=False", "--dtype=float32", "--max_iters=3", "--batch_size=2", "--eval_interval=0",
         "--log_interval=1"]  # fmt: skip


def writers(sources: Path) -> list[Writer]:
    def prepared(folder: Path) -> str:
        if not (sources / "tiny").exists():
            from train.prepare import prepare

            prepare("tiny", sources, sources / "0.txt")
        return f"--data_dir={sources}"

    return [
        Writer(
            "prepare a text", "train.prepare",
            lambda at, i: ["made", f"--source={sources / f'{i}.txt'}", f"--data_dir={at}"],
            lambda at: check_data(at / "made"), both=True,
        ),
        Writer(
            "prepare documents", "train.prepare",
            lambda at, i: ["made", f"--source={sources / f'{i}.jsonl'}", f"--data_dir={at}", "--val_fraction=0.5",
                           f"--tokenizer={sources / 'bytes'}", "--processes=1"],
            lambda at: check_data(at / "made"),
        ),
        Writer(
            "train a tokenizer", "train.tokenizer",
            lambda at, i: ["train", f"--source={sources / f'{i}.txt'}", f"--tokenizer={at / 'made'}",
                           "--vocab_size=270"],
            lambda at: load_bpe(at / "made").encode("the"), both=True,
        ),
        Writer(
            "train a model", "train.pretrain",
            lambda at, i: [*TRAIN, prepared(at), f"--out_dir={at / 'made'}", f"--seed={i}",
                           f"--learning_rate=0.00{i + 1}"],
            lambda at: check_run(at / "made"),
        ),
        Writer(
            "import", "gptfast.hf.__main__",
            lambda at, i: ["import", str(sources / f"model{i}"), f"--out_dir={at / 'made'}"],
            lambda at: check_import(at / "made"), both=True,
        ),
        Writer(
            "export", "gptfast.hf.__main__",
            lambda at, i: ["export", str(sources / f"model{i}"), f"--to={at / 'made'}"],
            lambda at: check_export(at / "made"), both=True,
        ),
        Writer(
            "export GGUF", "gptfast.hf.__main__",
            lambda at, i: ["export", str(sources / f"model{i}"), f"--to={at / 'made.gguf'}"],
            lambda at: len((at / "made.gguf").read_bytes()) == len((sources / "0.gguf").read_bytes()), both=True,
        ),
        Writer(
            "evaluate", "train.evaluate",
            lambda at, i: [f"--models={sources / f'model{i}'}", f"--text={sources / 'abcd.txt'}",
                           f"--out_dir={at / 'made'}", "--device=cpu"],
            lambda at: [json.loads(line) for line in (at / "made" / "evaluation.jsonl").read_text().splitlines()],
            both=True,
        ),
        Writer(
            "speedrun on a fresh checkout", "train.speedrun",
            lambda at, i: ["cpu", *TRAIN, "--dataset=pystdlib", f"--data_dir={at}", f"--out_dir={at / f'made{i}'}",
                           f"--seed={i}", "--num_samples=0", "--report=False", "--max_iters=3"],
            lambda at: [check_data(at / "pystdlib"), *(check_stage(made) for made in at.glob("made?"))], both=True,
        ),
        Writer(
            "speedrun", "train.speedrun",
            lambda at, i: ["cpu", *TRAIN, prepared(at), f"--out_dir={at / 'made'}", f"--seed={i}", "--num_samples=1"],
            lambda at: [check_stage(at / "made"), (at / "made" / "report.md").read_text()],
        ),
        Writer(
            "SFT", "train.sft",
            lambda at, i: [f"--init_from={talker(sources)}", f"--out_dir={at / 'made'}", "--mixture=addition", *STAGE,
                           f"--seed={i}", "--isolate=False", "--eval_iters=1"],
            lambda at: check_stage(at / "made"),
        ),
        Writer(
            "RL", "train.rl",
            lambda at, i: [f"--init_from={talker(sources)}", f"--out_dir={at / 'made'}", "--task=addition", *STAGE,
                           f"--seed={i}", "--examples_per_step=2", "--samples=2", "--max_new_tokens=4",
                           "--eval_examples=2", "--eval_samples=2"],
            lambda at: check_stage(at / "made"),
        ),
        Writer(
            "chat", "train.chat",
            lambda at, i: [f"--out_dir={at / 'made'}", f"--seed={i}", "--device=cpu", "--n_layer=1", "--n_embd=32",
                           "--vocab_size=400", "--block_size=64", "--base_iters=2", "--sft_iters=2", "--rl_iters=1",
                           "--examples=1", "--questions=1", "--answer_tokens=2"],
            lambda at: check_chat(at / "made"), goes_on=False,
        ),
    ]  # fmt: skip


def talker(sources: Path) -> Path:
    """A model that knows the form of conversations, made once."""
    folder = sources / "talker"
    if not folder.exists():
        tokenizer = BPETokenizer.from_ranks(
            {bytes([i]): i for i in range(256)}, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        )
        sizes = dict(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=16)
        config = dataclasses.replace(PRESETS["modern"], **sizes)
        meta = {"model": vars(config), "tokenizer": tokenizer.to_json(), "config": {}}
        checkpoint.save(folder, step=0, model=GPT(config, OPS).state_dict(), optimizer={}, meta=meta)
    return folder


@pytest.fixture
def tried(sources: Path, chaos: Callable[[int, int], int]) -> list[Writer]:
    """Some of the commands, or all with --chaos."""
    (sources / "abcd.txt").write_text("abcd" * 20)
    return writers(sources) if chaos(0, 1) else writers(sources)[1:8:2]


def test_two_at_once_leave_what_one_would(
    tried: list[Writer], server: Any, sources: Path, tmp_path: Path, chaos: Callable[[int, int], int]
) -> None:
    for writer in tried:
        draw, refused = random.Random(writer.name), 0
        for trial in range(chaos(1, 20)):
            folder = tmp_path / f"{writer.name} {trial}"
            folder.mkdir()
            apart = draw.choice([0.0, 0.0, draw.uniform(0, 0.3)])
            codes = run(server, writer, folder, draw.sample([0.0, apart], 2))
            if writer.name == "evaluate":  # wxyz cannot encode the text
                assert codes[0] == 0
            else:
                assert 0 in codes, [Path(folder / f"log{i}").read_text() for i in (0, 1)]
            refused += 2 in codes
            writer.check(folder)
            assert not leftovers(folder)
        if chaos(0, 1):
            print(f"{writer.name}: 20 trials, {refused} with one refused")


def test_an_interrupt_at_any_moment_is_one_line(
    tried: list[Writer], server: Any, sources: Path, tmp_path: Path, chaos: Callable[[int, int], int]
) -> None:
    """And the same command does its work afterwards."""
    for writer in tried[: chaos(2, 99)]:
        draw, stopped = random.Random(writer.name), 0
        for trial in range(chaos(1, 9)):
            folder = tmp_path / f"{writer.name} {trial}"
            folder.mkdir()
            codes = run(server, writer, folder, [0.0], interrupt=draw.uniform(0.01, 0.6))
            stopped += codes == [130]
            if codes != [0]:
                if not writer.goes_on:
                    shutil.rmtree(folder / "made", ignore_errors=True)
                assert run(server, writer, folder, [0.0]) == [0], (folder / "log0").read_text()
            writer.check(folder)
            assert not leftovers(folder)
        if chaos(0, 1):
            print(f"{writer.name}: 9 interrupts, {stopped} while it worked")
