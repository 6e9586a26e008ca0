"""Python that a model wrote, run where it can do no harm: a fresh process in a room of the operating system's own.

    sandbox = Sandbox()                            # raises UserError, which says how to get one, where there is none
    result = sandbox.run("print(6 * 7)")           # Result(ok=True, text='42\\n', why='')

The room is bubblewrap's where `bwrap` is installed, else made by Linux's namespaces (gptfast/chat/jail.py): no network,
no other processes, nothing of the machine's files but the Python that runs and the system's libraries, all read-only,
and a /tmp of its own of limited size. Memory, processes, files, CPU and wall time are limited, output is cut, and the
environment is empty. Only Python's standard library is there. Code never runs without all this.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gptfast.errors import UserError

JAIL = Path(__file__).with_name("jail.py")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")  # read-only in the room: what an interpreter is linked against
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
HOW = (
    "running Python needs a sandbox, and here is none: install bubblewrap (apt-get install bubblewrap), or allow user "
    "namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces=10000) on Linux"
)
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
EXTRA_S = 1.0  # for making the room and taking it down, beyond the code's own wall time


@dataclass(frozen=True)
class Limits:
    """What code may use."""

    seconds: float = 5.0  # of wall time, and of CPU time in each process
    memory_mb: int = 512  # address space of each process
    processes: int = 16  # threads included
    tmp_mb: int = 32  # files in /tmp
    output_bytes: int = 64 * 1024  # of stdout and stderr together; the rest is cut


@dataclass(frozen=True)
class Result:
    """What came of a piece of code."""

    ok: bool  # it ended by itself, with exit code 0
    text: str  # stdout and stderr together, cut to the limit
    why: str = ""  # what ended it otherwise, in a few words


Kind = Literal["auto", "bubblewrap", "namespaces"]


class Sandbox:
    """Runs code by `kind`: bubblewrap or namespaces; auto takes the first that works here.

    Any thread may call `run`, and many at once. Raises UserError, with what to install, where none works.
    """

    def __init__(self, limits: Limits | None = None, kind: Kind = "auto") -> None:
        self.limits = Limits() if limits is None else limits
        reasons = {}
        for name in ("bubblewrap", "namespaces") if kind == "auto" else (kind,):
            reasons[name] = why_not(name)
            if not reasons[name]:
                self.kind = name
                return
        raise UserError(f"{HOW} ({'; '.join(f'{name}: {reason}' for name, reason in reasons.items())})")

    def run(self, code: str, stdin: str = "") -> Result:
        """What `code` prints, as a program of its own that reads `stdin`."""
        return _run(self.kind, code, stdin, self.limits)


@cache
def why_not(kind: str) -> str:
    """Why this kind of sandbox does not work here, found out by running a line in it; empty if it does."""
    if not sys.platform.startswith("linux"):
        return f"this is {sys.platform}, not Linux"
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "there is no bwrap"
    if kind == "bubblewrap" and os.getuid() == 0:
        return "as root it does not change the user, and root's processes cannot be limited"
    result = _run(kind, "print('here')", "", Limits())
    return "" if result.ok and result.text == "here\n" else (result.text.strip().splitlines() or [result.why])[-1][:200]


def _run(kind: str, code: str, stdin: str, limits: Limits) -> Result:
    command = _bubblewrap(limits) if kind == "bubblewrap" else [sys.executable, "-I", "-S", str(JAIL)]
    task = json.dumps({"code": code, "stdin": stdin, "room": kind == "namespaces", **_room(), **asdict(limits)})
    # A session of its own: signals to its group cannot reach this process, and it has no terminal.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd="/",
        start_new_session=True, close_fds=True,
    )  # fmt: skip
    try:
        output, in_time = _converse(process, task.encode(), limits)
    finally:
        _end(process)
    text = output[: limits.output_bytes].decode("utf-8", "replace")
    cut = "" if len(output) <= limits.output_bytes else f"output cut at {limits.output_bytes:,} bytes"
    if not in_time:
        return Result(False, text, f"it took more than {limits.seconds:g} s")
    if process.returncode:
        return Result(False, text, f"it ended with code {process.returncode}")
    return Result(True, text, cut)


def _converse(process: subprocess.Popen[bytes], task: bytes, limits: Limits) -> tuple[bytes, bool]:
    """What it printed, one byte more than the limit at most, and whether it ended in time."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + limits.seconds + EXTRA_S
    output, left = bytearray(), memoryview(task)
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                if key.fileobj is process.stdin:
                    try:
                        left = left[os.write(process.stdin.fileno(), left[:65536]) :]
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    try:
                        process.wait(max(0.0, deadline - time.monotonic()))
                    except subprocess.TimeoutExpired:
                        return bytes(output), False
                    return bytes(output), True
                output += piece[: limits.output_bytes + 1 - len(output)]
    return bytes(output), False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it and all that it started: the kernel takes down a process namespace with its first process."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            pipe.close()


def _room() -> dict[str, Any]:
    """The interpreter that runs in the room, and the folders that it needs."""
    python = os.path.realpath(sys.executable)
    base = os.path.realpath(sys.base_prefix)
    folders = [folder for folder in SYSTEM if os.path.isdir(folder)]
    inside = any(f"{base}/".startswith(f"{folder}/") for folder in folders)
    return {"python": python, "folders": folders if inside else [*folders, base]}


def _bubblewrap(limits: Limits) -> list[str]:
    room = _room()
    binds = [part for folder in room["folders"] for part in ("--ro-bind", folder, folder)]
    # Not bubblewrap's own --dev, which is a file system that the code could fill.
    devices = [part for name in DEVICES for part in ("--dev-bind", name, name)]
    environment = [part for name, value in ENVIRONMENT.items() for part in ("--setenv", name, value)]
    return [
        str(shutil.which("bwrap")), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--clearenv", *environment, *binds, *devices, "--size", str(limits.tmp_mb * 2**20), "--tmpfs", "/tmp",
        "--ro-bind", str(JAIL), "/tmp/.jail.py", "--remount-ro", "/", "--chdir", "/tmp",
        room["python"], "-I", "-S", "/tmp/.jail.py",
    ]  # fmt: skip
