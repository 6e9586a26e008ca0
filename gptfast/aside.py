"""Writes files and folders atomically: first under another name, then renamed, so that no reader sees half of one."""

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
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of a file system without locks
LONGEST_HOLDER = 300  # characters of a lock file's text that are shown

_held: dict[tuple[int, int], int] = {}  # folders locked by this process, by device and inode -> lock count
_holder = os.getpid()  # the process that holds them; a fork holds nothing


class Busy(UserError):
    """Raised for a folder that another process is writing; the message names that process."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def aside_of(target: Path, pid: int | None = None) -> Path:
    """Returns the path, beside `target`, at which this process (or `pid`) builds it; unique even without locks.

    The target may be a link, perhaps to another disk: a rename then replaces the link and not the file it points to.
    """
    return target.with_name(f".tmp-{os.getpid() if pid is None else pid}-{target.name}")


@contextmanager
def file_aside(target: Path, *, flushed: bool = False) -> Iterator[Path]:
    """Yields a path to write to; renames it to `target` at the end, or removes it if anything fails.

    With `flushed`, its bytes are on the disk before the rename.
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
    """Writes a text file atomically, creating its folder; replaces a link. Raises UserError if it cannot."""
    with unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_aside(path) as building:
            building.write_text(text, "utf-8")


def check_writable(folder: Path) -> Path:
    """Creates a folder and returns it; called before any work. Raises UserError if no file can be created in it."""
    with unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tried = aside_of(folder / "try")
        tried.touch()
        tried.unlink()
    return folder


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another folder"
        raise UserError(f"{path}: cannot write there ({reason}); {fix}") from None


def flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_aside(target: Path, *, first: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields a folder to fill; moves its files into `target` at the end, or removes them if anything fails.

    A new or empty `target` appears in one rename. In a `target` with files, those of the same names are replaced and
    the `stale` ones removed; the file `first`, which readers require, is missing meanwhile. Raises Busy where another
    process is writing it.
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
                    raise  # else another process created it meanwhile; replace its files too
        with locked(target):
            (target / first).unlink(missing_ok=True)
            for name in stale:
                (target / name).unlink(missing_ok=True)
            for path in sorted(building.iterdir(), key=lambda path: path.name == first):  # `first` comes last
                os.replace(path, target / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Creates `folder` and locks it for the block: other processes get Busy, which names this one.

    With `wait`, prints that it waits, and waits for the lock. The lock is the system's, so it ends with the process; it
    is reentrant within a process. On a file system without locks nothing is locked.
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
    """Locks the file `path`, and writes a description of this process into it."""
    is_told = False
    while True:
        # does not follow a link, nor block on a pipe
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
                continue  # its holder removed it between our open and our lock
            os.ftruncate(file.fileno(), 0)
            with contextlib.suppress(OSError):  # on a full disk the lock holds without its text
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
    """Returns the holder that a lock's text names, sanitized to one line."""
    text = "".join(letter for letter in content.decode("utf-8", "replace") if letter.isprintable())
    return text[:LONGEST_HOLDER] or "another process"
