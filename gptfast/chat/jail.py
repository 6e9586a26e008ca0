"""Runs in a process of its own, started by gptfast/chat/sandbox.py: makes the room, limits itself, becomes the code.

Reads the task as JSON from stdin. Imports the standard library alone, since it runs without ours. Whatever fails ends
it before any of the code has run.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NEW_MOUNTS, NEW_HOST, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NETWORK, NEW_CGROUP = 0x10000000, 0x20000000, 0x40000000, 0x02000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
DIE_WITH_PARENT, NO_NEW_PRIVILEGES, DROP_BOUND = 1, 38, 24
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
ROOM = "/tmp"  # where the new root is put together; the machine's own /tmp is hidden by it, in this namespace alone
CODE = f"{ROOM}/main.py"  # in the room's own /tmp
DEVICES = ("null", "zero", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


def must(what: str, result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        sys.exit(f"sandbox: {what}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = [part.encode() for part in (source, target, kind)]
    must(f"mount {target}", libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None))


def bind(source: str, target: str) -> None:
    """`source` at `target`, read-only; what is mounted below `source` stays outside."""
    mount(source, target, "", BIND)
    mount("", target, "", BIND | REMOUNT | READ_ONLY | NO_SUID)


def leave(is_root: bool) -> None:
    """Namespaces of its own; a user who is not root becomes root of a user namespace, which owns the others."""
    user, group = os.getuid(), os.getgid()
    wanted = NEW_MOUNTS | NEW_PIDS | NEW_NETWORK | NEW_IPC | NEW_HOST | NEW_CGROUP
    must("namespaces", libc.unshare(wanted if is_root else wanted | NEW_USER))
    if not is_root:
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)


def build(task: dict[str, Any]) -> None:
    """The new root: nothing but the folders of the task, three devices and an empty /tmp."""
    mount("", "/", "", RECURSIVE | PRIVATE)
    mount("tmpfs", ROOM, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for folder in task["folders"]:
        os.makedirs(ROOM + folder, exist_ok=True)
        bind(os.path.realpath(folder), ROOM + folder)
    os.makedirs(ROOM + "/dev")
    for name in DEVICES:
        open(f"{ROOM}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{ROOM}/dev/{name}", "", BIND)
    os.makedirs(ROOM + "/tmp")
    mount("tmpfs", ROOM + "/tmp", "tmpfs", NO_SUID | NO_DEVICES, f"size={task['tmp_mb']}m,mode=1777,nr_inodes=10000")
    os.makedirs(ROOM + "/old")
    os.chdir(ROOM)
    must("pivot_root", libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"old"))
    os.chdir("/")
    must("umount", libc.umount2(b"/old", DETACH))
    os.rmdir("/old")
    mount("", "/", "", REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES)


def drop(is_root: bool) -> None:
    """No user's rights, no capability, and none to be had by running a program."""
    must("no new privileges", libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    for capability in range(64):
        libc.prctl(DROP_BOUND, capability, 0, 0, 0)  # fails past the last one
    if is_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    must("capabilities", libc.capset(header, nothing))


def limit(task: dict[str, Any]) -> None:
    memory, seconds = task["memory_mb"] * 2**20, max(1, round(task["seconds"]))
    for name, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_NPROC, task["processes"]), (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, task["tmp_mb"] * 2**20), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_MSGQUEUE, 0),
    ):  # fmt: skip
        resource.setrlimit(name, (most, most))


def become(task: dict[str, Any]) -> None:
    """This process becomes an interpreter that runs the code."""
    os.chdir("/tmp")
    with open(CODE, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(task["code"])
    with open("stdin", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(task["stdin"])
    os.dup2(os.open("stdin", os.O_RDONLY), 0)
    os.unlink("stdin")
    limit(task)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    os.execve(task["python"], [task["python"], "-I", "-S", "-B", CODE], environment)


def wait_for(child: int) -> int:
    """The exit code of `child`, and of no other process that ends meanwhile."""
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    if not task["room"]:  # bubblewrap has made it
        become(task)
    parent = os.getpid()
    is_root = os.getuid() == 0
    leave(is_root)
    first = os.fork()  # the first process of the new namespace, with which all others in it end
    if first:
        os._exit(wait_for(first))
    must("die with parent", libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
    if os.getppid() not in (0, parent):  # the parent of a first process reads as 0
        os._exit(1)
    build(task)
    drop(is_root)
    must("die with parent", libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))  # a change of user resets it
    child = os.fork()
    if not child:
        become(task)
    os.close(0)
    os._exit(wait_for(child))


if __name__ == "__main__":
    main()
