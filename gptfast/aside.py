"""Files and folders written aside and then put in their place, so that nobody ever reads half of one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptfast.errors import UserError

LOCK = ".lock"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` in one rename, or is removed if anything fails."""
    building = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        yield building
        building.chmod(0o666 & ~_umask())
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def folder_aside(target: Path, *, first: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to fill, whose files come into `target` when all are there; nothing of it stays if anything fails.

    A new or empty `target` comes to be in one rename. In one with files, those of the same names are replaced and the
    `stale` ones removed, and the file `first`, without which nobody reads the others, is gone in between.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    building.mkdir()
    try:
        yield building
        for path in building.iterdir():
            path.chmod(0o666 & ~_umask())
        if not target.is_dir() or not any(target.iterdir()):
            os.replace(building, target)
            return
        (target / first).unlink(missing_ok=True)
        for name in stale:
            (target / name).unlink(missing_ok=True)
        for path in sorted(building.iterdir(), key=lambda path: path.name == first):  # that one last
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it: another process that wants it meanwhile gets a UserError that names this one.

    The lock is the system's, and ends with the process however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(20).strip() or "unknown"
                raise UserError(
                    f"{folder} is being written by process {holder}; wait for it, or choose another folder"
                ) from None
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its holder removed it as it left, between our opening and our locking
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
