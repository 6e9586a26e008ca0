"""A run whose output nobody reads any more, or whose terminal was closed, saves and says so."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from gptfast import checkpoint, cli
from tests.test_bad_days import assert_same_end
from tests.test_bad_days import flags as flags  # the fixture
from train import pretrain
from train.guard import Stopper


class ClosedPipe(io.StringIO):
    """Output whose reader, such as `| head`, leaves when training has come so far."""

    def write(self, text: str) -> int:
        if "iter 7:" in self.getvalue():
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
