"""Every function of ours that reads a file, found on the syntax trees: what the hostile files must be given to.

`found()` names them `package/page.py:Class.function`; code outside functions is `:<module>`.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gptfast", "train", "bench")
PRIMITIVES = "gptfast/untrusted.py"  # what the others read through
# Calls that read a file or what it held, by their whole name, and by their last one whatever it belongs to.
CALLS = {
    "json.load", "json.loads", "np.load", "numpy.load", "torch.load", "gzip.open", "lzma.open", "bz2.open", "io.open",
    "csv.reader", "yaml.safe_load", "yaml.load", "yaml.parse", "tomllib.load", "tomllib.loads", "os.read", "os.pread",
    "mmap.mmap", "tarfile.open",
}  # fmt: skip
METHODS = {
    "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "genfromtxt", "safe_open", "load_file", "from_file",
    "from_pretrained", "load_dataset", "GzipFile", "LZMAFile", "BZ2File", "decompress", "ZipFile", "DictReader",
    "ParquetFile", "ParquetDataset", "read_table", "read_metadata", "read_schema", "read_csv", "read_json",
    "read_feather", "open_file", "open_stream", "input_stream", "FileHistory", "read_history_file", "OSFile",
    "memory_map", "urlopen", "safe_load",
}  # fmt: skip
WRITING = ("w", "a", "x", "wb", "ab", "xb")  # modes that read nothing

OURS = {  # readers that are given no hostile files, and why
    "bench/__main__.py:pages": "gptfast's own pages",
    "bench/cpu.py:compare": "a file that the same process wrote",
    "bench/cpu.py:plain_step": "a file that the same process wrote",
    "bench/deep.py:main": "a report that the same process had made",
    "bench/profile.py:events": "a trace that the same process had made",
    "bench/serve.py:ask_server": "answers of a server that the same process started",
    "bench/speedrun.py:run": "a log of a run that the same process started, in a folder of its own",
    "bench/stages.py:pack": "what the stages wrote, as bytes",
    "bench/stages.py:run_stages": "the output of a stage that the same process ran",
    "bench/timing.py:cpu_cache_bytes": "the kernel's files in /sys",
    "gptfast/chat/jail.py:become": "opens no file but those that it makes, in the sandbox",
    "gptfast/chat/jail.py:main": "what the parent process writes to it",
    "gptfast/chat/sandbox.py:_converse": "hostile code itself is in tests/test_sandbox.py",
    "gptfast/chat/terminal.py:_readline": "a history, whose size _check_history holds to a limit before",
    "gptfast/chat/terminal.py:_toolkit": "a history, whose size _check_history holds to a limit before",
    "gptfast/packing.py:PackedBatches._restore": "a run's position, which test_hostile_sources.py damages",
    "gptfast/checkpoint.py:_sha256": "hashes a file that was just written",
    "gptfast/log/__init__.py:_open_at_line_start": "the last byte of a file",
    "gptfast/log/machine.py:_first_processor": "the kernel's files in /proc",
    "gptfast/packing.py:Prefetched.state_dict": "copies a state by way of JSON",
    "gptfast/runtime.py:others_running": "the kernel's files in /proc",
    "gptfast/serve/app.py:Service._openai": "hostile requests are in tests/test_serve_hostile.py",
    "gptfast/serve/app.py:Service.nanochat": "hostile requests are in tests/test_serve_hostile.py",
    "gptfast/serve/asking.py:read_json": "hostile requests are in tests/test_serve_hostile.py",
    "gptfast/serve/page.py:read_page": "gptfast's own page",
    "train/conversations.py:from_hub": "opens no file: what `datasets` streams from the hub",
    "train/core.py:Journal.write": "the last byte of a file",
    "train/documents.py:Job.move": "a part that the same process wrote",
    "train/documents.py:Documents._open": "opens no file: what `datasets` streams from the hub",
    "train/download.py:_fetch": "hostile servers are in tests/test_download.py",
    "train/prepare.py:pystdlib_text": "Python's own library",
}


def unattacked(loaders: Iterable[Any], readers: Iterable[str]) -> list[str]:
    """What is to be said of each reader that no loader of tests/test_hostile*.py gives hostile files to."""
    attacked = {name for loader in loaders for name in loader.reads}
    return [
        f"{name} reads files, and no hostile ones are given to it: make a Loader in tests/test_hostile*.py that leads "
        "there and name it in the Loader's `reads`; or name it in OURS in tests/readers.py, with who writes its files"
        for name in sorted(set(readers) - attacked - set(OURS))
    ]


@cache
def found() -> dict[str, int]:
    """The readers of the repository, and the line of each one's first reading call."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    named = ((path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths)
    return {name: line for path, source in named if path != PRIMITIVES for name, line in of(path, source)}


def of(path: str, source: str) -> Iterator[tuple[str, int]]:
    """The readers of one page."""
    tree = ast.parse(source)
    imported = _primitives_imported(tree)
    seen: set[str] = set()
    for name, call in _calls(tree, ()):
        where = f"{path}:{name}"
        if where not in seen and _reads(call, imported):
            seen.add(where)
            yield where, call.lineno


def _calls(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the function that it stands in; one within another counts as the outer one's."""
    for child in ast.iter_child_nodes(node):
        within = inside
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and "()" not in inside:
            is_function = not isinstance(child, ast.ClassDef)
            within = (*inside, child.name, *(["()"] if is_function else []))
        if isinstance(child, ast.Call):
            yield ".".join(part for part in inside if part != "()") or "<module>", child
        yield from _calls(child, within)


def _reads(call: ast.Call, imported: set[str]) -> bool:
    name = dotted(call.func)
    last = call.func.attr if isinstance(call.func, ast.Attribute) else name
    if last == "open":
        return _opens_to_read(call, name)
    primitive = name.startswith("untrusted.") and last in primitives()
    return primitive or name in imported or name in CALLS or last in METHODS


def _opens_to_read(call: ast.Call, name: str) -> bool:
    if name == "os.open":
        return "O_WRONLY" not in ast.unparse(call)
    given = call.args[1:2] if name in ("open", "io.open", "gzip.open", "lzma.open", "bz2.open") else call.args[:1]
    given += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return not (given and isinstance(given[-1], ast.Constant) and given[-1].value in WRITING)


def _primitives_imported(tree: ast.Module) -> set[str]:
    """What a page calls what it imports from gptfast/untrusted.py by name."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("untrusted")
        for alias in node.names
        if alias.name in primitives()
    }


@cache
def primitives() -> frozenset[str]:
    """The functions and classes of gptfast/untrusted.py that read."""
    tree = ast.parse((ROOT / PRIMITIVES).read_text("utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return frozenset(names - {"expected", "plain_name", "reason", "marks", "Allowance"})


def dotted(node: ast.AST) -> str:
    """'torch.load' for the expression torch.load, '' for what is not a chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def entered(call: Callable[[], Any], names: Iterable[str]) -> set[str]:
    """Those of these functions that run, in any thread of this process, while `call` does."""
    wanted = set(names)
    files = {f"{ROOT / name.partition(':')[0]}" for name in wanted}
    seen: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in files:
            path = Path(code.co_filename).relative_to(ROOT).as_posix()
            seen.add(f"{path}:{code.co_qualname.partition('.<locals>')[0]}")

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
    return seen & wanted
