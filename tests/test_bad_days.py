"""Signals, NaNs, spikes, broken trackers, kills and damage: a run loses nothing, and says what happened.

`--chaos` is the long form of the random ones (results/chaos.md tells of the last); else each is a short version."""

from __future__ import annotations

import ast
import errno
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptfast import checkpoint, cli
from gptfast.data import load_tokens
from gptfast.errors import UserError
from gptfast.model import GPT
from train import pretrain
from train.guard import Guard, Refused, Stopped, Stopper
from train.prepare import prepare

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--device=cpu", "--compile=False", "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=2",
    "--n_layer=2", "--n_head=2", "--n_embd=16", "--dropout=0.1", "--eval_iters=2", "--eval_interval=5",
    "--warmup_iters=2", "--lr_decay_iters=20", "--max_iters=20", "--learning_rate=1e-2", "--dataset=tiny",
    "--log_interval=100", "--whole_val=False",
]  # fmt: skip


@pytest.fixture
def flags(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "text.txt").write_text(text[:4000])
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    return [*FLAGS, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.run(pretrain.main, flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def assert_same_end(left: Path, right: Path) -> None:
    """The last checkpoints are of one step, and bit for bit the same weights and optimizer."""
    a, b = checkpoint.load(left), checkpoint.load(right)
    assert a.step == b.step
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    for i, state in a.optimizer["state"].items():
        assert all(torch.equal(state[key], b.optimizer["state"][i][key]) for key in state)


# ---- what may not reach the weights


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_update_does_not_happen_and_the_batch_is_kept(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    where: str, value: float,
) -> None:  # fmt: skip
    """The post-mortem holds the weights before the update, and the batches that spoil it when tried again."""
    forward, calls = GPT.forward, []

    def poisoned(self: GPT, tokens: torch.Tensor, targets: torch.Tensor, **how: str) -> torch.Tensor:
        loss = forward(self, tokens, targets, **how)
        if self.training:
            calls.append((tokens, targets))
            if len(calls) == 2 * 7 + 1:  # iteration 7
                if where == "loss":
                    return loss * value
                loss.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    message = refusal(flags, capsys)
    what = "loss" if where == "loss" else "gradient"
    assert f"the {what} is not a number at iteration 7; lower --learning_rate" in message
    assert "post-mortem" in message and "ckpt-000007" in message
    assert sorted(path.name for path in (tmp_path / "out").glob("ckpt-*")) == ["ckpt-000005"]

    found = checkpoint.load(tmp_path / "out" / "post-mortem")
    assert found.step == 7 and all(tensor.isfinite().all() for tensor in found.model.values())
    refused = found.meta["refused"]["batches"]
    assert len(refused) == 2
    for (tokens, targets), (x, y) in zip(refused, calls[14:16], strict=True):
        assert torch.equal(tokens, x) and torch.equal(targets, y)

    monkeypatch.setattr(GPT, "forward", forward)  # without the fault, 7 steps lead to just these weights
    assert cli.run(pretrain.main, [*flags, f"--out_dir={tmp_path / 'whole'}", "--max_iters=7"]) == 0
    assert_same_end(tmp_path / "out" / "post-mortem", tmp_path / "whole")


def test_skipped_updates_are_counted_and_too_many_in_a_row_stop(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls, bad = GPT.forward, [], {3, 8, 9}

    def poisoned(self: GPT, *batch: torch.Tensor, **how: str) -> torch.Tensor:
        if self.training:
            calls.append(batch)
        nan = self.training and (len(calls) - 1) // 2 in bad
        return forward(self, *batch, **how) * (math.nan if nan else 1.0)

    monkeypatch.setattr(GPT, "forward", poisoned)
    flags = [*flags, "--nonfinite=skip", "--max_skips=2"]
    assert cli.run(pretrain.main, flags) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "update skipped" in line]
    assert said[-1] == "iteration 9: update skipped, the loss is not a number; 3 so far" and len(said) == 3
    found = checkpoint.load(tmp_path / "out")
    assert found.meta["guard"]["skipped"] == 3 and found.step == 20
    assert found.optimizer["state"][0]["step"].item() == 20 - 3  # the checkpoint is of before iteration 20
    calls.clear()
    bad.update({10})
    assert "not a number, as were 2 before at iteration 10" in refusal(flags, capsys)


def judged(watch: Guard, loss: float, norm: float = 1.0) -> bool:
    """Whether an update passes, by the rule that the device follows (gptfast/step.py); the guard hears of it."""
    taken = math.isfinite(loss) and math.isfinite(norm) and loss <= watch.limit()
    watch.record(loss, norm, taken, [])
    return taken


def test_spikes_are_skipped_and_neither_they_nor_a_nan_move_the_measure() -> None:
    draw = random.Random(0)
    watch = Guard(nonfinite="skip", spike=5.0)
    for i in range(300):
        normal = 3.0 + draw.gauss(0, 0.1)
        assert judged(watch, normal)
        if i > 20:
            for bad in (math.nan, math.inf, 30.0):
                assert not judged(watch, bad)
            assert not judged(watch, normal, math.nan)
    assert watch.skipped == 4 * 279 and max(watch.state_dict()["losses"]) < 4
    assert judged(watch, 1.0)  # falling fast is no spike
    again = Guard(nonfinite="skip", spike=5.0)
    again.load_state_dict(watch.state_dict())
    assert not judged(again, 30.0) and again.skipped == watch.skipped + 1


def test_a_level_that_stays_high_stops_the_run_instead_of_skipping_for_ever() -> None:
    watch = Guard(spike=5.0, max_skips=3)
    for i in range(50):
        judged(watch, 3.0 + 0.01 * (i % 3))
    assert [judged(watch, 9.0) for _ in range(3)] == [False] * 3
    with pytest.raises(Refused, match=r"is a spike over 3\.0098"):
        judged(watch, 9.0)


# ---- signals


def test_a_signal_waits_while_held_and_raises_at_once_otherwise() -> None:
    with Stopper() as stopper:
        stopper.release()
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)  # while the first is dealt with
    with Stopper() as stopper:
        stopper.hold("an optimizer", (), {})
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped, match="SIGUSR1"):
            stopper.release()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with Stopper(deferred=True) as stopper:
        stopper.release()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.signum == signal.SIGTERM
        stopper.release()
        with pytest.raises(Stopped, match="SIGTERM"):
            stopper.release(agreed=signal.SIGTERM)


SERVER = """
import os, signal, sys, threading, time, random
import torch
from gptfast import cli, checkpoint
from train import pretrain
torch.set_num_threads(1)
flags, folder, seed, count, kind = sys.argv[5:], sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def child(argv, after_s=None, signum=None, in_save=False):
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        if in_save:
            save_now = checkpoint.save
            def save(*args, **parts):
                threading.Timer(after_s, os.kill, (os.getpid(), signum)).start()
                return save_now(*args, **parts)
            checkpoint.save = save
        code = 99
        try:
            code = cli.run(pretrain.main, argv)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    if after_s is not None and not in_save:
        time.sleep(after_s)
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
    sent = time.monotonic()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - sent

draw = random.Random(seed)
out = f"--out_dir={folder}/out"
started = time.monotonic()
assert child([*flags, f"--out_dir={folder}/whole"]) [0] == 0
whole_s = time.monotonic() - started
stopped = finished = 0
slowest = 0.0
while stopped < count:
    if kind == "kill":
        in_save = stopped % 2 == 0
        after = draw.uniform(0, 0.006) if in_save else draw.uniform(0.02, whole_s)
        code, _ = child([*flags, out, "--resume=latest"], after, signal.SIGKILL, in_save)
        expected = {-signal.SIGKILL}
    else:
        signum = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
        code, took = child([*flags, out, "--resume=latest"], draw.uniform(0.1, whole_s), signum)
        slowest = max(slowest, took)
        expected = {128 + signum, -signum}  # the latter: before training began
    assert code in expected | {0}, code
    stopped += code in expected
    if code == 0:
        finished += 1
        os.rename(f"{folder}/out", f"{folder}/out{finished}")
code, _ = child([*flags, out, "--resume=latest"])
assert code == 0, code
os.rename(f"{folder}/out", f"{folder}/out{finished + 1}")
print(stopped, finished + 1, slowest)
"""


def serve(tmp_path: Path, flags: list[str], count: int, kind: str) -> tuple[int, int, float]:
    """Runs stopped at random moments and started again by the same command, until `count` were: how many, how many
    runs were finished, and the longest time between a signal and the end. All forked from one process, for speed."""
    command = [sys.executable, "-c", SERVER, str(tmp_path), "0", str(count), kind, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stopped, finished, slowest = done.stdout.split()[-3:]
    for number in range(1, int(finished) + 1):
        assert_same_end(tmp_path / f"out{number}", tmp_path / "whole")
    return int(stopped), int(finished), float(slowest)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_signals_at_random_moments(tmp_path: Path, flags: list[str], chaos: Callable[[int, int], int]) -> None:
    """Each run saves and is gone; resumed and resumed, it ends bit for bit like one that nobody disturbed."""
    count = chaos(3, 50)
    stopped, _, slowest = serve(tmp_path, flags, count, "signal")
    assert stopped == count and slowest < 10


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kills_at_random_moments(tmp_path: Path, flags: list[str], chaos: Callable[[int, int], int]) -> None:
    """kill -9, every other one inside a save."""
    count = chaos(4, 200)
    stopped, _, _ = serve(tmp_path, [*flags, "--eval_interval=2"], count, "kill")
    assert stopped == count


class ClosedPipe(io.StringIO):
    """Output whose reader, such as `| head`, leaves when training has come so far."""

    is_closed = False

    def write(self, text: str) -> int:
        self.is_closed |= text.startswith("iter 7:")
        if self.is_closed:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_output_that_nobody_reads_any_more_saves_and_says_so(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The update under way is finished first: resumed, the run ends as one that was read to its end."""
    flags = [*flags, "--log_interval=1", "--max_iters=40"]
    assert cli.run(pretrain.main, [*flags, f"--out_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", ClosedPipe())
        assert cli.run(pretrain.main, flags) not in (0, 2)
    said = capfd.readouterr().err
    assert "the output cannot be written any more: saving, then leaving" in said
    saved = checkpoint.load(tmp_path / "out")
    assert 0 < saved.step < 40 and f"SIGPIPE at iteration {saved.step}; go on with --resume=latest" in said
    assert cli.run(pretrain.main, [*flags, "--resume=latest"]) == 0
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_closed_terminal_saves_unless_nohup_was_asked_for() -> None:
    for before, caught in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        own = signal.signal(signal.SIGHUP, before)
        try:
            with Stopper() as stopper:
                os.kill(os.getpid(), signal.SIGHUP) if caught else None
                assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) is not caught
                assert stopper.signum == (signal.SIGHUP if caught else None)
            assert signal.getsignal(signal.SIGHUP) == before
        finally:
            signal.signal(signal.SIGHUP, own)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path, flags: list[str]) -> None:
    program = (
        "import os, signal, sys, time; from gptfast import checkpoint, cli; from train import pretrain\n"
        "def stuck(*a, **k): os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "checkpoint.save = stuck\n"
        "sys.exit(cli.run(pretrain.main, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *flags, "--max_iters=100000", "--eval_interval=100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(line.startswith("iter 0") for line in iter(process.stdout.readline, ""))
        started = time.monotonic()
        process.send_signal(signal.SIGINT)  # it saves, for ever; there the second one comes
        try:
            assert process.wait(20) == 130 and time.monotonic() - started < 10
        finally:
            process.kill()
        assert "leaving without a save" in process.stderr.read()


# ---- damage and full disks


def test_a_damaged_byte_never_trains(tmp_path: Path, flags: list[str], chaos: Callable[[int, int], int]) -> None:
    """Single flipped bits and truncations of token files and checkpoints: each is found, and named in one line."""
    assert cli.run(pretrain.main, [*flags, "--max_iters=5"]) == 0
    (folder,) = (tmp_path / "out").glob("ckpt-*")
    draw = random.Random(0)
    count = chaos(400, 2000)
    found = 0
    for i in range(count):
        on_tokens = i % 2 == 0
        files = [tmp_path / "data" / "tiny" / name for name in ("train.bin", "val.bin")] if on_tokens else [
            path for path in folder.iterdir() if path.stat().st_size
        ]  # fmt: skip
        path = draw.choice(sorted(files))
        whole = path.read_bytes()
        damaged = bytearray(whole)
        if draw.random() < 0.5:
            bit = draw.randrange(8 * len(whole))
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            del damaged[draw.randrange(len(whole)) :]
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load_tokens(path) if on_tokens else checkpoint.load(tmp_path / "out")
        found += str(path if on_tokens else folder) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole)
    assert found == count
    assert checkpoint.load(tmp_path / "out").step == 5


FULL = """
import resource, signal, sys
from gptfast import cli
from train import pretrain
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with EFBIG, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.run(pretrain.main, sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_is_full_in_the_background_ends_the_run(tmp_path: Path, flags: list[str]) -> None:
    assert cli.run(pretrain.main, [*flags, "--max_iters=5"]) == 0
    command = [sys.executable, "-c", FULL, "20000", *flags, "--resume=latest", "--async_save=True"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: cannot save") and "MB needed" in error and "free some space" in error
    assert str(tmp_path / "out" / "ckpt-000010") in error
    assert [path.name for path in (tmp_path / "out").glob("*ckpt-*")] == ["ckpt-000005"]
    assert checkpoint.load(tmp_path / "out").step == 5


FILLED = """
import hashlib, os, random, resource, signal, subprocess, sys
from pathlib import Path
import torch
from gptfast import checkpoint, cli
from train import pretrain
folder, how, count, flags = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if how == "disk":  # of its own, 4 MiB in pages of 4 KiB
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)

def run(argv, said, limit=resource.RLIM_INFINITY):
    pid = os.fork()
    if pid == 0:
        where = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(where, 1), os.dup2(where, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        os._exit(cli.run(pretrain.main, argv))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

out, said = folder / "out", folder.parent / "said"
flags = [*flags, f"--out_dir={out}", "--resume=latest", "--log_interval=1000"]
assert run([*flags, "--max_iters=5"], said) == 0, said.read_text()
content = lambda: {path.name: path.read_bytes() for path in sorted(out.glob("*ckpt-*/*"))}
before, row = content(), len((out / "metrics.jsonl").read_bytes())
sizes = [len(data) for data in before.values()]
draw = random.Random(0)
reasons = {}
for i in range(count):
    (out / "metrics.jsonl").write_bytes(b"")  # else the log has no room, and the save is not reached
    limit = resource.RLIM_INFINITY
    if how == "disk":
        room = os.statvfs(folder)
        ballast = room.f_bavail * room.f_frsize - draw.randrange(3 * 4096, sum(sizes))
        (folder / "ballast").write_bytes(bytes(ballast))
    else:
        limit = draw.randrange(row, max(sizes))
    code = run(flags, said, limit)
    (folder / "ballast").unlink(missing_ok=True)
    error = said.read_text().splitlines()[-1]
    assert code == 2 and error.startswith("error: cannot "), said.read_text()
    assert str(out) in error and " needed" in error and "free some space" in error, error
    assert content() == before and not list(out.glob(".tmp-*")), list(out.rglob("*"))
    assert checkpoint.load(out).step == 5
    reason = error.partition("): ")[2].partition(";")[0]
    reasons[reason] = reasons.get(reason, 0) + 1
assert run(flags, said) == 0 and checkpoint.load(out).step == 20  # with room again it goes on
print(reasons)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE and tmpfs")
@pytest.mark.parametrize("how", ["limit", "disk"])
def test_a_disk_that_is_full_at_any_byte_costs_nothing(
    tmp_path: Path, flags: list[str], how: str, chaos: Callable[[int, int], int]
) -> None:
    """Files that may not grow past a random size, and a disk of its own with random room (ENOSPC itself)."""
    count, alone = chaos(3, 50), ["unshare", "-Urm"]  # -Urm: with mounts that nobody else sees
    if how == "disk" and subprocess.run(["sh", "-c", " ".join([*alone, "true"])], capture_output=True).returncode:
        pytest.skip("needs user namespaces (unshare -Urm) for a disk of its own; the case 'limit' needs none")
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", FILLED, str(tmp_path / "disk"), how, str(count), *flags]
    command = alone + command if how == "disk" else command
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reasons = ast.literal_eval(done.stdout.splitlines()[-1])
    assert sum(reasons.values()) == count
    assert how == "limit" or all("No space left on device" in reason for reason in reasons)


def test_a_log_without_room_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").symlink_to("/dev/full")
    assert "metrics.jsonl" in refusal(flags, capsys) and not list((tmp_path / "out").glob("*ckpt-*"))


# ---- ranks


MORTAL = """
import os, random, sys, threading, time
from pathlib import Path
from gptfast import cli
from gptfast.parallel import launch, saving
from gptfast.step import Step
from train import pretrain
notes, count = Path(sys.argv[1]), int(sys.argv[2])
attempt, rank, size = launch().attempt, launch().rank, launch().size
draw = random.Random(attempt)  # the same on every rank
victim, fatal, in_save = draw.randrange(size), draw.randint(1, 12), attempt % 2 == 1
delay_s = draw.uniform(0, 0.02)
step, save, steps = Step.__call__, saving.save_sharded, []

def die():
    (notes / f"killed-{attempt}").write_text(str(time.time()))
    os.kill(os.getpid(), 9)

def step_or_die(*args, **settings):
    if not steps and rank == 0:
        (notes / f"began-{attempt}").write_text(str(time.time()))
    steps.append(1)
    if len(steps) == fatal and attempt < count and rank == victim and not in_save:
        die()
    return step(*args, **settings)

def save_and_die(*args, **settings):
    if attempt < count and rank == victim and in_save:
        threading.Timer(delay_s, die).start()
    return save(*args, **settings)

Step.__call__, saving.save_sharded = step_or_die, save_and_die
sys.exit(cli.run(pretrain.main, sys.argv[3:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo and torchrun")
def test_dead_ranks_end_the_job_and_restarts_resume_it(
    tmp_path: Path, text: str, chaos: Callable[[int, int], int]
) -> None:
    """A random rank dies without a word, every other time within a save; torchrun starts all again, and they go on."""
    from test_parallel import torchrun

    count = chaos(1, 20)
    (tmp_path / "text.txt").write_text(text[:4000])
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    (tmp_path / "mortal.py").write_text(MORTAL)
    (tmp_path / "notes").mkdir()
    flags = [
        *FLAGS, "--n_layer=1", "--dropout=0", "--dtype=float32", f"--data_dir={tmp_path / 'data'}", "--resume=latest",
        f"--max_iters={15 * count}", f"--lr_decay_iters={15 * count}",
    ]  # fmt: skip
    out, program = f"--out_dir={tmp_path / 'out'}", [str(tmp_path / "mortal.py"), str(tmp_path / "notes"), str(count)]
    done = torchrun(2, f"--max-restarts={count}", *program, *flags, out, timeout_s=100 + 60 * count)
    assert done.returncode == 0, done.stderr[-3000:]
    when = lambda what, attempt: float((tmp_path / "notes" / f"{what}-{attempt}").read_text())
    lost = [when("began", attempt + 1) - when("killed", attempt) for attempt in range(count)]
    print(f"{count} kills; seconds from death to the next step: {min(lost):.1f} to {max(lost):.1f}")
    assert len(list((tmp_path / "notes").glob("killed-*"))) == count and max(lost) < 60
    assert "Resuming training from" in done.stdout
    found = checkpoint.load(tmp_path / "out")
    assert found.step == 15 * count and found.meta["guard"]["skipped"] == 0
    assert cli.run(pretrain.main, [*flags, f"--out_dir={tmp_path / 'alone'}"]) == 0
    for name, tensor in checkpoint.load(tmp_path / "alone").model.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=0, atol=1e-6)


# ---- resume


def test_resume_latest_starts_anew_only_where_there_is_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*flags, "--resume=latest", "--max_iters=10"]
    assert cli.run(pretrain.main, short) == 0
    assert "--resume=latest: no checkpoint in" in capsys.readouterr().out
    assert cli.run(pretrain.main, [*flags, "--resume=latest"]) == 0
    assert "Resuming training from" in capsys.readouterr().out
    assert cli.run(pretrain.main, [*flags, f"--out_dir={tmp_path / 'whole'}"]) == 0
    assert_same_end(tmp_path / "out", tmp_path / "whole")
    capsys.readouterr()
    assert cli.run(pretrain.main, [*flags, "--resume=15", "--max_iters=16"]) == 0
    assert f"Resuming training from {tmp_path / 'out' / 'ckpt-000015'}" in capsys.readouterr().out
    assert "--resume=sometimes: use latest" in refusal([*flags, "--resume=sometimes"], capsys)
    for folder in (tmp_path / "out").glob("ckpt-*"):
        (folder / "model.safetensors").write_bytes(b"")
    assert "no whole checkpoint" in refusal(short, capsys)  # not in silence from scratch, over what may be mended


def rows(out_dir: Path) -> list[dict]:
    lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["what"] == "eval"]


# ---- trackers


class Broken:
    def __init__(self, fails: str) -> None:
        self.fails, self.sent = fails, []

    def init(self, **_: object) -> None:
        if self.fails == "init":
            raise RuntimeError("no network")

    def log(self, row: dict) -> None:
        if self.fails == "log" and len(self.sent) == 2:
            raise ConnectionError("down")
        if self.fails == "hang" and len(self.sent) == 2:
            time.sleep(60)
        self.sent.append(row)


@pytest.mark.parametrize("fails", ["init", "log", "hang"])
def test_a_tracker_that_fails_does_not_stop_a_run(
    flags: list[str], tmp_path: Path, fails: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Broken(fails)
    monkeypatch.setitem(sys.modules, "trackio", service)
    monkeypatch.setattr("gptfast.log.trackers.TRACKER_PATIENCE_S", 0.2)
    assert cli.run(pretrain.main, [*flags, "--tracker=trackio"]) == 0
    assert "warning: trackio" in capsys.readouterr().err
    assert len(rows(tmp_path / "out")) == 5 and len(service.sent) == (0 if fails == "init" else 2)
