"""Files and folders written aside and then put in their place, so that nobody ever reads half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptfast.errors import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none
LONGEST_HOLDER = 300  # characters of what a lock says of its holder

_held: dict[tuple[int, int], int] = {}  # folders, by device and inode, that this process holds: how often
_holder = os.getpid()  # of which process that is; a fork holds nothing


class Busy(UserError):
    """A folder that another process writes; the message names it."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def aside_of(target: Path, pid: int | None = None) -> Path:
    """Where this process (or `pid`) makes what becomes `target`: beside it, and its own even where no lock keeps order.

    The target itself may be a link, to another disk perhaps: a rename then replaces the link and not what it names.
    """
    return target.with_name(f".tmp-{os.getpid() if pid is None else pid}-{target.name}")


@contextmanager
def file_aside(target: Path, *, flushed: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `target` in one rename, or is removed if anything fails.

    With `flushed` its bytes are on the disk before that rename.
    """
    building = aside_of(target)
    try:
        yield building
        building.chmod(0o666 & ~_umask())
        if flushed:
            flush(building)
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file of text whole or not at all, and its folder; a link is replaced. Raises UserError if it cannot."""
    with unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_aside(path) as building:
            building.write_text(text, "utf-8")


def check_writable(folder: Path) -> Path:
    """Makes a folder, and returns it; before any work. Raises UserError where no file can be made in it."""
    with unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tried = aside_of(folder / "try")
        tried.touch()
        tried.unlink()
    return folder


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """What the disk refuses in the block is a UserError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another folder"
        raise UserError(f"{path}: cannot write there ({reason}); {fix}") from None


def flush(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on the disk and not only in the kernel's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_aside(target: Path, *, first: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to fill, whose files come into `target` when all are there; nothing of it stays if anything fails.

    A new or empty `target` comes to be in one rename. In one with files, those of the same names are replaced and the
    `stale` ones removed, and the file `first`, without which nobody reads the others, is gone in between. Raises Busy
    where another process is at that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = aside_of(target)
    building.mkdir()
    try:
        yield building
        for path in building.iterdir():
            path.chmod(0o666 & ~_umask())
        if not target.is_dir() or not any(target.iterdir()):
            try:
                os.replace(building, target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise  # else another came first, and its files are replaced like those of before
        with locked(target):
            (target / first).unlink(missing_ok=True)
            for name in stale:
                (target / name).unlink(missing_ok=True)
            for path in sorted(building.iterdir(), key=lambda path: path.name == first):  # that one last
                os.replace(path, target / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Makes `folder` and holds it: another process that wants it meanwhile gets Busy, which names this one.

    With `wait` it says so, and waits. The lock is the system's, and ends with the process however that ends; a process
    may take it again while it holds it. On a file system without locks nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    global _holder
    if _holder != os.getpid():
        _holder = os.getpid()
        _held.clear()
    status = folder.stat()
    key = status.st_dev, status.st_ino
    if key not in _held:
        with _locked(folder / LOCK, wait):
            _held[key] = 1
            try:
                yield
            finally:
                del _held[key]
        return
    _held[key] += 1
    try:
        yield
    finally:
        _held[key] -= 1


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    """Holds the file `path`, whose text names this process."""
    is_told = False
    while True:
        # not followed if it is a link, nor waited for if it is a pipe
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        with open(descriptor, "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = f"{path.parent} is being written by {_named(file.read(4 * LONGEST_HOLDER))}"
                if not wait:
                    raise Busy(f"{text}; wait for it, or choose another folder") from None
                if not is_told:
                    print(f"{text}: waiting", flush=True)
                is_told = True
                time.sleep(0.2)
                continue
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its holder removed it as it left, between our opening and our locking
            os.ftruncate(file.fileno(), 0)
            with contextlib.suppress(OSError):  # a full disk holds the lock all the same
                file.write(_myself().encode("utf-8", "replace"))
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _myself() -> str:
    arguments = [argument if argument.isprintable() else "..." for argument in sys.orig_argv[1:]]
    return f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(['python', *arguments])})"


def _named(content: bytes) -> str:
    """What a lock's text says of its holder, whoever wrote it, on one line."""
    text = "".join(letter for letter in content.decode("utf-8", "replace") if letter.isprintable())
    return text[:LONGEST_HOLDER] or "another process"
