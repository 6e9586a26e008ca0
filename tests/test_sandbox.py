"""The sandbox: programs run, and forty ways out of it that lead nowhere."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptfast.chat import sandbox as page
from gptfast.chat.sandbox import Limits, Result, Sandbox, why_not
from gptfast.chat.tools import Tools
from gptfast.errors import UserError

KINDS = ("bubblewrap", "namespaces")
QUICK = Limits(seconds=1, memory_mb=256, processes=8, tmp_mb=4, output_bytes=2000)


@pytest.fixture(params=KINDS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return Sandbox(QUICK, request.param)


def test_a_program_runs(sandbox: Sandbox) -> None:
    assert sandbox.run("import math\nprint(math.comb(10, 3))") == Result(True, "120\n")
    assert sandbox.run("print(input()[::-1])", stdin="olleh\n") == Result(True, "hello\n")
    assert sandbox.run("open('/tmp/a', 'w').write('x'); print(open('/tmp/a').read())") == Result(True, "x\n")
    assert sandbox.run("raise SystemExit(3)") == Result(False, "", "it ended with code 3")
    failed = sandbox.run("def f(:\n")
    assert not failed.ok and "SyntaxError" in failed.text
    assert Tools(python=sandbox).run("print('ä' * 2)") == "ää\n" and Tools(python=sandbox).run("2*3") == "6"


def test_each_run_is_fresh(sandbox: Sandbox) -> None:
    sandbox.run("open('/tmp/left', 'w').write('x')")
    assert sandbox.run("import os; print(os.path.exists('/tmp/left'))").text == "False\n"


def test_many_threads_may_run_programs(sandbox: Sandbox) -> None:
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: sandbox.run(f"print({i})").text}))  # type: ignore[misc]
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(6)}


# Programs that print "out" if they get out of the room, and must not.
NOT_OUT = {
    "reads a file of the machine": "open('/etc/passwd'); print('out')",
    "reads root's files": "import os; os.listdir('/root/.ssh'); print('out')",
    "lists the repository": "import os; os.listdir(REPO); print('out')",
    "reads the repository": "open(REPO + '/README.md'); print('out')",
    "writes beside the interpreter": "import sys; open(sys.prefix + '/x', 'w'); print('out')",
    "writes to /usr": "open('/usr/x', 'w'); print('out')",
    "writes to the root": "open('/x', 'w'); print('out')",
    "writes to /dev": "open('/dev/x', 'w'); print('out')",
    "changes the interpreter": "import os, sys; os.chmod(os.path.realpath(sys.executable), 0o777); print('out')",
    "removes the standard library": "import os; os.remove(os.__file__); print('out')",
    "follows a link": "import os; os.symlink('/etc/passwd', '/tmp/l'); open('/tmp/l').read(); print('out')",
    "climbs out of the root": "import os; os.chdir('/' + '../' * 20); open('etc/passwd'); print('out')",
    "changes its root": "import os; os.mkdir('/tmp/r'); os.chroot('/tmp/r'); print('out')",
    "asks the network": "import socket; socket.create_connection(('1.1.1.1', 53), 0.5); print('out')",
    "asks this machine": "import socket; socket.create_connection(('127.0.0.1', PORT), 0.5); print('out')",
    "asks for a name": "import socket; socket.getaddrinfo('example.com', 80); print('out')",
    "sends a datagram": "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('8.8.8.8', 53)); print('out')",
    "opens a raw socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print('out')",
    "an abstract unix socket": "import socket; s = socket.socket(1, 1); s.connect('\\0gptfast-test'); print('out')",
    "signals its parents": "import os\nfor p in (os.getppid(), PARENT):\n os.kill(p, 9)\n assert p == 1\nprint('out')",
    "signals everyone": "import os, time\nos.kill(-1, 9); time.sleep(.1); os.kill(PARENT, 0); print('out')",
    "signals another's group": "import os; os.killpg(PARENT, 9); print('out')",
    "traces another": "import ctypes; assert ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) == 0; print('out')",
    "reads another's memory": "open(f'/proc/{PARENT}/mem', 'rb'); print('out')",
    "reads another's environment": "open(f'/proc/{PARENT}/environ', 'rb'); print('out')",
    "lists the processes": "import os; [p for p in os.listdir('/proc') if p == str(PARENT)][0]; print('out')",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0; print('out')",
    "remounts": "import ctypes; assert ctypes.CDLL(None).mount(b'', b'/', b'', 32 | 4096, 0) == 0; print('out')",
    "unmounts": "import ctypes; assert ctypes.CDLL(None).umount2(b'/usr', 2) == 0; print('out')",
    "joins a namespace": "import ctypes, os; assert ctypes.CDLL(None).setns(0, 0) == 0; print('out')",
    "becomes root": "import os; assert os.getuid(); os.setuid(0); print('out')",
    "becomes another": "import os; os.setuid(12345); print('out')",
    "makes a device": "import os, stat; os.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(8, 0)); print('out')",
    "reads a disk": "open('/dev/sda', 'rb'); print('out')",
    "reads kernel memory": "open('/dev/mem', 'rb'); print('out')",
    "reads a secret of the environment": "import os; os.environ['SECRET_OF_TEST']; print('out')",
    "uses open files": "import os\nfor i in range(3, 64):\n try: os.fstat(i)\n except OSError: continue\n print('out')",
    "raises its limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1)); print('out')",
    "sets the clock": "import time; time.clock_settime(0, 0); print('out')",
    "names the machine": "import socket; socket.sethostname('x'); print('out')",
    "types at the terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); print('out')",
    "imports what is installed here": "import torch; print('out')",
    "gives a program another user's rights": "import os; os.open('/usr/bin/su', os.O_WRONLY); print('out')",
    "makes a file of a huge size": "f = open('/tmp/f', 'wb'); f.truncate(2**40); print('out')",
    "fills the memory": "x = bytearray(2**33); print('out')",
    "fills memory by an integer": "x = 1 << (2**33); print('out')",
    "recurses": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf(); print('out')",
    "makes many threads": "import threading, time\nfor _ in range(100):\n"
    " threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\nprint('out')",
    "makes many files": "for i in range(100000): open(f'/tmp/{i}', 'w').write('x')\nprint('out')",
    "opens many files": "x = [open('/dev/null') for _ in range(100)]; print('out')",
}  # fmt: skip


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of this machine, which nobody in the sandbox may reach; and a unix socket in the abstract space."""
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        local.bind("\0gptfast-test")
        local.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("attempt", NOT_OUT)
def test_no_way_out(attempt: str, sandbox: Sandbox, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "x")
    known = f"REPO = {str(Path(__file__).parents[1])!r}; PORT = {port}; PARENT = {os.getpid()}\n"
    started = time.monotonic()
    result = sandbox.run(known + NOT_OUT[attempt])
    assert "out\n" not in result.text.replace("print('out')\n", ""), result
    assert not result.ok or attempt == "uses open files", result
    assert time.monotonic() - started < QUICK.seconds + page.EXTRA_S + 2  # the limit, and a busy machine


def test_endless_work_ends(sandbox: Sandbox) -> None:
    assert sandbox.run("while True: pass").why in ("it took more than 1 s", "it ended with code 137")
    slept = sandbox.run("print('begun', flush=True)\nimport time; time.sleep(60)")
    assert slept == Result(False, "begun\n", "it took more than 1 s")


def test_endless_output_is_cut(sandbox: Sandbox) -> None:
    long = sandbox.run("print('x' * 10000)")
    assert long == Result(True, "x" * 2000, "output cut at 2,000 bytes")
    assert len(sandbox.run("while True: print('y' * 1000)").text) == 2000


def test_a_fork_bomb_stays_small_and_dies(sandbox: Sandbox) -> None:
    """It counts its own forks before it is out of processes; none of them outlives the run."""
    counting = (
        "import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(9); os._exit(0)\n    n += 1\n"
        "except OSError: print(n)"
    )
    count = int(sandbox.run(counting).text)
    assert count <= QUICK.processes
    bomb = sandbox.run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass")
    assert not bomb.ok
    deadline = time.monotonic() + 5  # the kernel takes a moment to bury them
    while any("/tmp/main.py" in command for command in commands()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def commands() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found.append((entry / "cmdline").read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue
    return found


def test_tmp_has_a_size(sandbox: Sandbox) -> None:
    filled = sandbox.run("for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(2**20))")
    assert not filled.ok and "No space left" in filled.text


def test_where_there_is_none_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(page, "why_not", lambda kind: "not here")
    monkeypatch.setattr(page.subprocess, "Popen", lambda *a, **k: ran.append(a))
    with pytest.raises(UserError, match=r"install bubblewrap.*bubblewrap: not here; namespaces: not here"):
        Sandbox()
    assert not ran


def test_another_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert page.why_not.__wrapped__("namespaces") == "this is darwin, not Linux"
