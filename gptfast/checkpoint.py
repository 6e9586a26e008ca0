"""Checkpoints that survive a crash at any instant, and are verified before use.

    out/ckpt-000250/  model.safetensors
                      optimizer.json + optimizer.safetensors     any nesting of dicts, lists, tensors and plain values
                      meta.json [+ meta.safetensors]             likewise: configuration, RNG states, data position
                      manifest.json                              written last: size and sha256 of every other file

A save is built in out/.tmp-*, flushed to the disk, and renamed into place: before the rename only the older checkpoints
exist, and after it the new one is complete. The last k and the best are kept. Nothing is pickled: structure is JSON,
numbers are safetensors, and every tensor is restored with its exact bits and dtype.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gptfast import untrusted
from gptfast.aside import aside_of, flush, locked
from gptfast.errors import UserError, remedy

FORMAT = 2
FIELDS = {  # fields of the manifest, by format
    1: {"format", "serial", "step", "files", "sha256"},
    2: {"format", "serial", "step", "score", "files", "sha256"},
}
MANIFEST = "manifest.json"
PARTS = "parts.json"  # file in a checkpoint with one file of tensors per rank
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
FOLDER = re.compile(r"(?:\.replaced-)?ckpt-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. Tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    meta: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = field(default=())  # newer but invalid checkpoints, with the reasons


def save(
    out_dir: str | Path,
    *,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    meta: dict[str, Any],
    keep: int = 2,
    score: float | None = None,
    first: bool = False,
    write_parts: Callable[[Path], None] | None = None,
) -> Path:
    """Writes out_dir/ckpt-<step:06d>/ and removes all but the `keep` last saved and the best; returns its path.

    `write_parts` writes a parallel run's tensors into the folder, in place of `model` (see gptfast/parallel/saving.py).
    The best has the lowest `score`, such as a validation loss; a checkpoint without a score is never the best. `first`
    of a run: those of an earlier run in out_dir are removed, or the best of both could be taken for this one's.
    `optimizer` and `meta` may nest dicts, lists, tuples, tensors, str, int, float, bool and None; anything else raises
    TypeError before a byte is written. Raises UserError, and keeps the existing checkpoints, where the disk is full,
    out_dir cannot be written, or another process writes it.
    """
    if keep < 1:
        raise UserError(f"cannot keep {keep} checkpoints; keep 1 or more")
    out_dir = Path(out_dir)
    target = out_dir / f"ckpt-{step:06d}"
    building = building_of(out_dir, step)
    trees = {name: _flatten(tree, name) for name, tree in (("optimizer", optimizer), ("meta", meta))}
    if score is not None and not math.isfinite(score):
        score = None
    try:
        with locked(out_dir):
            _remove_leftovers(out_dir)
            serial = 1 + max((_serial(path) or 0 for path in _folders(out_dir)), default=0)
            building.mkdir()
            if write_parts is None:
                _write_tensors(building / "model.safetensors", model)
            else:
                write_parts(building)
            for name, (structure, tensors) in trees.items():
                (building / f"{name}.json").write_text(json.dumps(structure, indent=1, allow_nan=False), "utf-8")
                if tensors:
                    _write_tensors(building / f"{name}.safetensors", tensors)
            files = {path.name: _fingerprint(path) for path in sorted(building.iterdir())}
            manifest = {"format": FORMAT, "serial": serial, "step": step, "score": score, "files": files}
            _write_manifest(building / MANIFEST, manifest)
            flush(building)
            _move_into_place(building, target)
            _prune(out_dir, keep, first)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise _save_error(error, target, model, *(tensors for _, tensors in trees.values())) from None
    return target


class Saver:
    """Saves checkpoints; with background=True on a thread, while training continues.

    The thread writes a CPU copy, made before `save` returns. Only one save runs at a time: the next `save` waits for
    the last, and raises its UserError if it failed. Leaving the `with` block waits too.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, out_dir: str | Path, **parts: Any) -> Path:
        """Calls `checkpoint.save`; returns the path of the checkpoint that is, or will be, written."""
        self.wait()
        if not self.background:
            return save(out_dir, **parts)
        self._thread = threading.Thread(target=self._write, args=(out_dir, _copy_to_cpu(parts, {})))
        self._thread.start()
        return Path(out_dir) / f"ckpt-{parts['step']:06d}"

    def wait(self) -> None:
        """Waits until the last save is on the disk. Raises its error if it failed."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            print(f"warning: {error}", file=sys.stderr)  # the block's own exception matters more

    def _write(self, out_dir: str | Path, parts: dict[str, Any]) -> None:
        try:
            save(out_dir, **parts)
        except BaseException as error:
            self._error = error


def _copy_to_cpu(tree: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """Returns the same tree with every tensor copied; tensors that share memory (tied weights) still do."""
    if isinstance(tree, Tensor):
        place = _place(tree)
        if place not in copies:
            copies[place] = tree.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(tree, dict):
        return {key: _copy_to_cpu(item, copies) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copy_to_cpu(item, copies) for item in tree)
    return tree


def building_of(out_dir: str | Path, step: int, pid: int | None = None) -> Path:
    """Returns the folder in which this process, or `pid`, builds the checkpoint of a step."""
    return aside_of(Path(out_dir) / f"ckpt-{step:06d}", pid)


def exists(out_dir: str | Path) -> bool:
    """Returns whether there is a checkpoint in `out_dir`, valid or not."""
    return Path(out_dir).is_dir() and bool(_folders(Path(out_dir)))


def last_step(out_dir: str | Path) -> int | None:
    """Returns the step of the checkpoint in `out_dir` that was saved last, valid or not; None where there is none."""
    return _step(_folders(Path(out_dir))[0]) if exists(out_dir) else None


def load(out_dir: str | Path, step: int | None = None, *, best: bool = False) -> Checkpoint:
    """Loads the last saved valid checkpoint of `out_dir`, the one of `step`, or the best (lowest score).

    Newer ones that are truncated, altered or unreadable are named on stderr and in `skipped`. Raises UserError where
    there is none, none is valid, or the one of `step` is not.
    """
    out_dir = Path(out_dir)
    folders = _folders(out_dir) if out_dir.is_dir() else []
    if not folders:
        raise UserError(f"no checkpoint in {out_dir}; train one first, or point --out_dir to a run that has one")
    if step is not None:
        folders = [path for path in folders if _step(path) == step]
        if not folders:
            steps = sorted({_step(path) for path in _folders(out_dir)})
            raise UserError(f"{out_dir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    if best:
        folders = sorted((path for path in folders if _score(path) < math.inf), key=_score)
        if not folders:
            raise UserError(f"no checkpoint in {out_dir} tells its validation loss; resume the latest")
    skipped: list[str] = []
    for folder in folders:
        try:
            checkpoint = _read(folder, tuple(skipped))
        except (OSError, ValueError) as error:
            skipped.append(f"{folder}: {untrusted.reason(error) if isinstance(error, OSError) else error}")
            continue
        for reason in skipped:
            print(f"warning: skipped damaged checkpoint {reason}; using {folder}", file=sys.stderr)
        return checkpoint
    raise UserError(f"no whole checkpoint: {'; '.join(skipped)}; restore a copy, or train again in another --out_dir")


# ---- the folders of out_dir


def _folders(out_dir: Path) -> list[Path]:
    """Returns the checkpoints of `out_dir`, the last saved first.

    They are ordered by time of saving, not by step, so that a run started anew in an old folder finds its own. Those
    without a readable manifest come first, so that `load` reports them; a replaced checkpoint follows its replacement.
    """
    folders = [path for path in out_dir.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]

    def newness(path: Path) -> tuple[float, int]:
        serial = _serial(path)
        return (math.inf if serial is None else serial, _step(path))

    return sorted(folders, key=newness, reverse=True)


def _step(folder: Path) -> int:
    match = FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _serial(folder: Path) -> int | None:
    """Returns the ordinal of this save within its out_dir; None if the manifest cannot be read."""
    try:
        return _read_manifest(folder)["serial"]
    except (OSError, ValueError):
        return None


def _score(folder: Path) -> float:
    """Returns the score of a checkpoint; infinity if it has none or the manifest cannot be read."""
    try:
        score = _read_manifest(folder).get("score")
    except (OSError, ValueError):
        return math.inf
    return math.inf if score is None else score


def _move_into_place(building: Path, target: Path) -> None:
    """Renames `building` to `target`. Until then a checkpoint of the same step stays loadable under another name."""
    replaced = target.with_name(f".replaced-{target.name}")
    if target.exists():
        if replaced.exists():  # left by a crash after the rename
            _remove(replaced)
        os.rename(target, replaced)
    try:
        os.rename(building, target)
    except OSError:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    flush(target.parent)
    if replaced.exists():
        _discard(replaced)


def _prune(out_dir: Path, keep: int, first: bool = False) -> None:
    """Removes all but the `keep` last saved and the best, or if `first` all but the last saved.

    Unreadable ones stay: they may be of a newer gptfast.
    """
    readable = [path for path in _folders(out_dir) if _serial(path) is not None]
    best, keep = (readable[0], 1) if first else (min(readable, key=_score), keep)  # on a tie, the newest
    for path in readable[keep:]:
        if path != best or _score(path) == math.inf:
            _discard(path)


def _discard(folder: Path) -> None:
    """Removes an old checkpoint. The new one is safe by now, so a failure is no reason to stop a run."""
    try:
        _remove(folder)
    except OSError as error:
        print(f"warning: cannot remove the old checkpoint {folder}: {error}", file=sys.stderr)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; renames it first, so that a crash leaves no checkpoint with missing files."""
    doomed = folder.with_name(f".tmp-removed-{folder.name}")
    os.rename(folder, doomed)
    _erase(doomed)


def _erase(path: Path) -> None:
    """Removes a folder, or a link to one (checkpoints moved to another disk), but never a link's target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_leftovers(out_dir: Path) -> None:
    """Removes what a crash left behind. The caller holds the lock of out_dir."""
    for path in out_dir.glob(".tmp-*ckpt-*"):
        _erase(path)


def _save_error(error: Exception, target: Path, *groups: dict[str, Tensor]) -> UserError:
    needed = sum(tensor.nbytes for tensors in groups for tensor in tensors.values())
    try:
        existing = next(path for path in target.parents if path.exists())
        free = f", {shutil.disk_usage(existing).free / 1e6:,.1f} MB free"
    except OSError:
        free = ""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    unwritable = getattr(error, "errno", None) in UNWRITABLE
    fix = "make the folder writable" if unwritable else remedy(error, "see to that disk")
    return UserError(
        f"cannot save {target} ({needed / 1e6:,.1f} MB needed{free}): {reason}; {fix}, or choose another --out_dir"
    )


# ---- one checkpoint


def _read(folder: Path, skipped: tuple[str, ...]) -> Checkpoint:
    """Checks every file against the manifest, then reads it. Raises ValueError or OSError with the reason."""
    manifest = _read_manifest(folder)
    listed = manifest["files"]
    _check_listed(folder, listed)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_opened(folder, name, listed[name])) for name in listed}
        with untrusted.expected("what it holds", "its sha256 is right, so it was made so"):
            optimizer, meta = _read_tree(files, "optimizer"), _read_tree(files, "meta")
            if PARTS in listed:
                from gptfast.parallel.parts import read_parts

                parts = [file for name, file in files.items() if _is_part(name)]
                model = read_parts(parts, optimizer, _read_json(files[PARTS])["aliases"])
            else:
                model = _read_tensors(files["model.safetensors"])
    return Checkpoint(manifest["step"], model, optimizer, meta, folder, skipped)


def _opened(folder: Path, name: str, expected: dict[str, Any]) -> BufferedReader:
    """Opens a file of a checkpoint and checks it against the manifest; a later rename does not change what is read."""
    try:
        file = untrusted.opened(folder / name)
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {untrusted.reason(error)}") from None
    size = os.fstat(file.fileno()).st_size
    problem = ""
    if size != expected["bytes"]:
        problem = f"{name} has {size} bytes, not {expected['bytes']}"
    elif hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
        problem = f"{name} is altered (sha256 differs)"
    if problem:
        file.close()
        raise ValueError(problem)
    file.seek(0)
    return file


def _is_part(name: str) -> bool:
    """Returns whether a file of a sharded checkpoint holds one rank's part of the tensors."""
    return name.endswith(".safetensors") and name not in ("meta.safetensors", "optimizer.safetensors")


def _check_listed(folder: Path, listed: dict[str, Any]) -> None:
    """Raises ValueError if a required file is not listed, or if the folder has an unlisted file that would be read."""
    needed = {"optimizer.json", "meta.json", *(() if PARTS in listed else ("model.safetensors",))}
    if not needed <= set(listed):
        raise ValueError(f"{MANIFEST} does not list {', '.join(sorted(needed - set(listed)))}")
    for name in listed:
        if not untrusted.plain_name(name):
            raise ValueError(f"{MANIFEST} lists {name[:80]!r}, which is no file of its folder")
    present = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}
    stray = sorted(present - set(listed) - {MANIFEST})
    if stray:
        raise ValueError(f"{stray[0]} is not of it, for {MANIFEST} does not list it; move it elsewhere")


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    path.write_bytes(_canonical(manifest))
    flush(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest. Raises ValueError unless it is exactly as `_write_manifest` wrote it, with every field."""
    try:
        content = untrusted.content(folder / MANIFEST, untrusted.LARGEST_JSON)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    try:
        manifest = untrusted.parsed(content)
    except ValueError:
        raise ValueError(f"{MANIFEST} is altered (not JSON)") from None
    has_fields = isinstance(manifest, dict) and {"format", "sha256"} <= set(manifest)
    # What is nested deeper than a manifest would take a thousand times its size when it is written again.
    if (
        not has_fields
        or not _is_flat(manifest, 3)
        or _canonical({key: manifest[key] for key in manifest if key != "sha256"}) != content
    ):
        raise ValueError(f"{MANIFEST} is altered (sha256 differs)")
    if manifest["format"] not in list(FIELDS) or set(manifest) != FIELDS[manifest["format"]]:
        raise ValueError(f"written in format {manifest['format']}; this gptfast reads formats 1 to {FORMAT}")
    score, files = manifest.get("score"), manifest["files"]
    fits = all(type(manifest[name]) is int and 0 <= manifest[name] < 2**63 for name in ("serial", "step"))
    fits &= score is None or (type(score) in (int, float) and math.isfinite(score))
    fits &= isinstance(files, dict) and all(
        isinstance(entry, dict) and {"bytes": int, "sha256": str} == {key: type(item) for key, item in entry.items()}
        for entry in files.values()
    )
    if not fits:
        raise ValueError(f"{MANIFEST} holds what no manifest holds")
    return manifest


def _is_flat(value: Any, depth: int) -> bool:
    """Returns whether JSON is nested at most this deep."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not items or (depth > 0 and all(_is_flat(item, depth - 1) for item in items))


def _canonical(manifest: dict[str, Any]) -> bytes:
    """Returns the unique serialization of a manifest, its own sha256 included."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def _fingerprint(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk; returns its size and sha256."""
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- tensors: safetensors; a tensor with several names is stored once


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the tensors. A second name of the same tensor (tied weights) becomes an alias in the file's metadata."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        key = _place(tensor)
        if tensor.numel() and key in first_name:
            aliases[name] = first_name[key]
            continue
        first_name[key] = name
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.cpu().contiguous()
        # safetensors refuses tensors that overlap, such as two slices of one buffer.
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    safetensors.torch.save_file(stored, path, metadata={"format": "pt", "aliases": json.dumps(aliases)})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it 0600; give it the folder's permissions


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Returns a key that is equal for tensors with the same memory, shape, strides and dtype."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _read_tensors(file: BufferedReader) -> dict[str, Tensor]:
    tensors, about = untrusted.tensors(file)
    aliases = untrusted.parsed(about.get("aliases", "{}"))
    return tensors | {name: tensors[stored_name] for name, stored_name in aliases.items()}


# ---- trees: JSON for the structure, with {"$tensor": name} in place of each tensor


def _flatten(tree: Any, path: str) -> tuple[Any, dict[str, Tensor]]:
    """Returns a JSON value of the same structure, and the tensors by path, such as `optimizer.state.0.exp_avg`."""
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            name = path
            while name in tensors:  # {"1": a} and {1: b} have the same path
                name += "'"
            tensors[name] = value
            return {"$tensor": name}
        if isinstance(value, (list, tuple)):
            items = [encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, dict):
            items = [(encode(key, path), encode(item, f"{path}.{key}")) for key, item in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
            return dict(items) if plain else {"$dict": [list(item) for item in items]}
        raise TypeError(f"cannot save {path}, a {type(value).__name__}: use tensors, numbers, strings, lists and dicts")

    return encode(tree, path), tensors


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns the tree that `_flatten` was given; what it was written as is used up, so that both are never held."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            value[i] = _unflatten(item, tensors)
        return value
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, content), *_ = value.items()
        if key == "$tensor":
            return tensors[content]
        if key == "$float":
            return float(content)
        if key == "$tuple":
            return tuple(_unflatten(item, tensors) for item in content)
        if key == "$dict":
            return {_unflatten(key, tensors): _unflatten(item, tensors) for key, item in content}
    for key, item in value.items():
        value[key] = _unflatten(item, tensors)
    return value


def _read_json(file: BufferedReader) -> Any:
    return untrusted.parsed(untrusted.whole(file, untrusted.LARGEST_JSON))


def _read_tree(files: dict[str, BufferedReader], name: str) -> dict[str, Any]:
    stored = files.get(f"{name}.safetensors")
    tree = _unflatten(_read_json(files[f"{name}.json"]), {} if stored is None else _read_tensors(stored))
    if not isinstance(tree, dict):
        raise ValueError(f"{name}.json holds no object")
    return tree
