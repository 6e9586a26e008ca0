"""Files as somebody would write them who wishes harm, made of good ones; and how a loader must take them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast import checkpoint, cli, untrusted
from gptfast.errors import UserError
from gptfast.untrusted import LARGEST_JSON
from tests import readers

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**63, 10**12, 99_999_999_999, 10**40, -(10**12), 0.5, -0.5,
    1e-320, 1e308, float("nan"), float("inf"), "", "a", "1", "../x", "../../x", "/etc/passwd", "\0", "é" * 300,
    "x" * 5000, [], [[]], [1, 2], [None], {}, {"a": 1}, {"$tensor": "w"}, {"$dict": 5}, {"$tuple": None},
    {"$float": "x"}, {"": {}},
]  # fmt: skip
BOMBS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
DEEP = 200_000
HEADROOM = 2 * 2**30  # bytes that a loader may take
BOMB = re.compile(r"\bmemory\b|alloc|MemoryError")  # in an error that says that it took them; no field's name


@dataclass(frozen=True)
class Loader:
    """What reads files that a stranger may have written."""

    name: str
    make: Callable[[Path], None]  # fills a folder with good ones
    load: Callable[[Path], Any]  # raises UserError for others
    finish: Callable[[Path], None] = lambda folder: None  # makes what vouches for the files vouch for these
    writes: bool = False  # into the folder itself
    reads: tuple[str, ...] = ()  # functions that the files come to, as tests/readers.py names them


@contextlib.contextmanager
def little_memory(headroom: int = HEADROOM) -> Iterator[None]:
    """This process may take `headroom` bytes more."""
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + headroom, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def attacks(loader: Loader, folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Mutates one file of a new folder and loads it, `count` times: how often it was refused, and how often taken.

    AssertionError names the mutation after which the loader raised anything else than a UserError of one line, asked
    for memory without end, or wrote a file.
    """
    draw = random.Random(f"{loader.name} {seed}")
    inside = folder / "a" / "b"  # so that ../../x of what lies in it is in `folder`, and seen
    good = inside / "good"
    good.mkdir(parents=True)
    loader.make(good)
    originals = {path.relative_to(good): path.read_bytes() for path in sorted(good.rglob("*")) if path.is_file()}
    _check_reads(loader, good)
    verdicts = {"refused": 0, "taken": 0}
    for number in range(count):
        target = inside / f"{number}"
        for name, content in originals.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
        path = target / draw.choice(list(originals))
        what = mutate(path, draw, heavy=count > 100 and number % 40 == 20)  # of those that take seconds
        loader.finish(target)
        before = times(folder, target if loader.writes else None)
        where = f"{loader.name} {number}, {path.name}: {what}"
        try:
            with little_memory():
                loader.load(target)
            verdicts["taken"] += 1
        except UserError as error:
            verdicts["refused"] += 1
            shown = cli._on_one_line(str(error))  # as every command shows it
            assert len(shown) < 2000 and shown.isprintable(), f"{where}: {error!r}"
            assert not BOMB.search(str(error)), f"{where}: {error}"
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        after = times(folder, target if loader.writes else None)
        assert after == before, f"{where}: it wrote {after.items() ^ before.items()}"
        shutil.rmtree(target)
    return verdicts


def _check_reads(loader: Loader, good: Path) -> None:
    """AssertionError unless the good files come to all functions that the loader names."""
    if not loader.reads:
        return
    folder = good.parent / "whole"
    shutil.copytree(good, folder)
    loader.finish(folder)
    missed = set(loader.reads) - readers.entered(lambda: loader.load(folder), loader.reads)
    assert not missed, f"the files of {loader.name} do not come to {', '.join(sorted(missed))}"
    shutil.rmtree(folder)


def times(folder: Path, left_out: Path | None) -> dict[Path, int]:
    """When each file was written."""
    paths = (path for path in folder.rglob("*") if left_out is None or not path.is_relative_to(left_out))
    return {path: path.lstat().st_mtime_ns for path in paths if not path.is_dir()}


def mutate(path: Path, draw: random.Random, heavy: bool = False) -> str:
    """Makes the file another, and says how; `heavy`: one that takes as much memory and time as a file of its size."""
    content = path.read_bytes()
    kinds = ["cut", "cut", "flip", "flip", "noise", "pipe", "folder", "device", "deep", "missing", "empty"]
    kinds += ["bomb", "bomb"] if path.suffix in BOMBS else []
    structured = path.suffix in (".json", ".jsonl") and not heavy
    if heavy:
        kinds = ["wide"] if path.suffix in BOMBS else ["wide", "holes"]
    kind = draw.choice(["value"] * 20 + ["drop"] * 6 + ["add"] * 2 + kinds if structured else kinds)
    if structured and kind in ("value", "drop", "add"):
        lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        number = draw.randrange(len(lines))
        tree = json.loads(lines[number])
        what = _mutate_tree(tree, kind, draw)
        lines[number] = json.dumps(tree if what[0] != "whole" else what[1])
        path.write_text("\n".join(lines), "utf-8")
        return f"{kind} {what}"[:300]
    if kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif kind == "flip":
        bits = bytearray(content)
        for _ in range(draw.choice([1, 8, 64])):
            if bits:
                bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
        path.write_bytes(bits)
    elif kind == "noise":
        path.write_bytes(draw.randbytes(draw.choice([1, 7, 100, 5000])))
    elif kind == "deep":
        path.write_text("[" * DEEP if draw.random() < 0.5 else '{"a":' * DEEP)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "holes":  # of no size on the disk
        os.truncate(path, 2**33)
    elif kind == "wide":  # what takes most memory for its size
        path.write_text("[" + '{"":[]},' * (LARGEST_JSON // 8 - draw.choice([1, -1])) + "0]")
    elif kind == "bomb":
        path.write_bytes(BOMBS[path.suffix](bytes(2**24)) * 200)  # more than 3 GB; one part follows another
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
    return kind


def _mutate_tree(tree: Any, kind: str, draw: random.Random) -> tuple[str, Any]:
    """Changes one value of a tree of JSON at a random depth: (where, what)."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        for key, value in items[:200]:
            places.append((node, key))
            walk(value)

    walk(tree)
    value = draw.choice(VALUES)
    if not places or (kind == "value" and draw.random() < 0.02):
        return "whole", value
    node, key = draw.choice(places)
    if kind == "drop":
        del node[key]
    elif kind == "add" and isinstance(node, dict):
        node[draw.choice(["extra", "../x", "", "__class__"])] = value
    else:
        node[key] = value
    return str(key), value


def signed(folder: Path) -> None:
    """Makes the manifests of the checkpoints in `folder` vouch for the files as they are."""
    for path in folder.glob("ckpt-*/manifest.json"):
        try:
            manifest = json.loads(untrusted.content(path))
            for each in path.parent.iterdir():
                is_small = each.is_file() and each.stat().st_size < 2**28  # hashing what is larger takes too long
                if each.name != path.name and is_small and not each.is_symlink():
                    manifest["files"][each.name] = checkpoint._fingerprint(each)
            manifest.pop("sha256", None)
            path.write_bytes(checkpoint._canonical(manifest))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # the manifest itself is what was attacked
