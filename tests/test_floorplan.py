"""The rules of the house, read off the syntax trees: what may import what, and where each kind of knowledge lives.

Every rule is a function from a page's source to its offences. `test_rule` runs it over the repository;
`test_rule_sees` shows that it finds a planted offence and lets the honest neighbour pass.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "gptfast": {"kernels", "gptfast"},
    "train": {"kernels", "gptfast", "train"},
    "bench": {"kernels", "gptfast", "bench"},
    "tests": {"kernels", "gptfast", "train", "bench", "tests"},
}
TOP_LEVEL = {
    *MAY_IMPORT, "results", ".ci", ".gitignore", "Makefile", "pyproject.toml", "constraints.txt",
    "README.md", "DESIGN.md", "AGENTS.md", "docs", "LICENSE", "SECURITY.md", "CHANGELOG.md",
}  # fmt: skip
NOT_OPS = {"__init__", "__main__", "_triton", "op", "prims", "proof"}
OP_MAY_IMPORT = {"_triton", "op", "prims"}
IMPORTS_TRITON = {"_triton", "proof"}
IMPORTED_AT_ONCE = {"torch", "triton", "numpy", "safetensors"}  # all others are heavy or rare, and wait for their use
LONGEST_PAGE = 600
LONGEST_FUNCTION = 60


@dataclass(frozen=True)
class Page:
    """One Python file: its dotted module name, its source, and the tree of that source."""

    path: str  # relative to the repository: 'kernels/layernorm.py'
    source: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        return self.path.split("/")[0]

    @property
    def room(self) -> str:
        """The file or sub-package directly under the package: 'layernorm' for both shapes that a page may take."""
        return self.path.split("/")[1].removesuffix(".py")

    @property
    def tree(self) -> ast.Module:
        return _parse(self.source)


@dataclass(frozen=True)
class Import:
    name: str  # dotted and absolute: 'kernels.op', 'torch.distributed'
    line: int
    at_once: bool  # at module level, so that importing the page imports this
    for_types: bool = False  # under TYPE_CHECKING


@cache
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


def imports(page: Page) -> Iterator[Import]:
    """Every import of a page. `from a import b` yields both a and a.b, since b may be a module."""
    parents = page.module.split(".") if page.path.endswith("__init__.py") else page.module.split(".")[:-1]
    nodes = list(ast.walk(page.tree))
    typing = {id(inner) for outer in nodes if _is_type_checking(outer) for inner in ast.walk(outer)}
    functions = [outer for outer in nodes if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = typing | {id(inner) for outer in functions for inner in ast.walk(outer)}
    for node in nodes:
        when = id(node) not in lazy, id(node) in typing
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, *when)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            if base:
                yield Import(".".join(base), node.lineno, *when)
            for alias in node.names:
                yield Import(".".join([*base, alias.name]), node.lineno, *when)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def dotted(node: ast.AST) -> str:
    """'torch.distributed' for the expression torch.distributed, '' for what is not a chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_ours(name: str) -> bool:
    return name.split(".")[0] in MAY_IMPORT


# ---- rules: page -> lines that break them ----------------------------------------------------------------------------


def imports_go_one_way(page: Page) -> Iterator[int]:
    """torch, triton <- kernels <- gptfast <- {train, bench} <- tests."""
    for found in imports(page):
        if is_ours(found.name) and found.name.split(".")[0] not in MAY_IMPORT[page.package]:
            yield found.line


def kernels_need_only_torch_and_triton(page: Page) -> Iterator[int]:
    """kernels/ imports torch, triton, the standard library, and numpy where it meets Triton's interpreter."""
    if page.package != "kernels":
        return
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    if page.room == "proof":
        allowed.add("numpy")
    for found in imports(page):
        if found.name.split(".")[0] not in allowed:
            yield found.line


def triton_has_one_door(page: Page) -> Iterator[int]:
    """`import triton` stands in _triton.py, and in the tools that take Triton apart."""
    if page.package == "tests" or (page.package == "kernels" and page.room in IMPORTS_TRITON):
        return
    for found in imports(page):
        if found.name.split(".")[0] == "triton":
            yield found.line


def ops_do_not_import_ops(page: Page) -> Iterator[int]:
    """The page of an op imports _triton, op, prims, and the other pages of its own package."""
    if page.package != "kernels" or page.room in NOT_OPS:
        return
    for found in imports(page):
        parts = found.name.split(".")
        if parts[0] == "kernels" and len(parts) > 1 and parts[1] not in OP_MAY_IMPORT | {page.room}:
            yield found.line


def heavy_imports_wait(page: Page) -> Iterator[int]:
    """tyro, pandas, matplotlib and the like are imported where they are used: `import gptfast` stays light."""
    if page.package == "tests":
        return
    light = IMPORTED_AT_ONCE | set(MAY_IMPORT) | set(sys.stdlib_module_names)
    if page.package == "bench" and page.path.split("/")[-1].startswith("test_"):
        light |= {"pytest"}
    for found in imports(page):
        if found.at_once and found.name.split(".")[0] not in light:
            yield found.line


def only_parallel_is_distributed(page: Page) -> Iterator[int]:
    """torch.distributed is touched by gptfast/parallel alone."""
    if page.module.startswith("gptfast.parallel") or page.package == "tests":
        return
    yield from (found.line for found in imports(page) if f"{found.name}.".startswith("torch.distributed."))
    yield from (node.lineno for node in ast.walk(page.tree) if dotted(node) == "torch.distributed")


def the_environment_has_two_readers(page: Page) -> Iterator[int]:
    """Environment variables change a run without a trace, save torchrun's (parallel) and the C library's (runtime)."""
    if page.module in ("gptfast.parallel", "gptfast.runtime") or page.package == "tests":
        return
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
    yield from (found.line for found in imports(page) if found.name in names)
    yield from (node.lineno for node in ast.walk(page.tree) if dotted(node) in names)


GPU_NAME = re.compile(r"\b(A10G?|A40|A[18]00|G?H[1-8]00|H20|G?B[1-3]00|L4|L40S?|V100|T4|RTX|MI\d{3}X?|TPU)\b")


def only_mfu_holds_peaks(page: Page) -> Iterator[int]:
    """Peaks stand, with their sources, in mfu.py; elsewhere no number past a tera, and no GPU's name with a figure."""
    if page.path == "gptfast/mfu.py" or page.package == "tests":
        return
    for node in ast.walk(page.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and 1e12 < node.value < float("inf"):
            yield node.lineno
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = [_number(node.left), _number(node.right)]
            if None not in sides and sides[0] * sides[1] > 1e12 and isinstance(sides[0] * sides[1], float):
                yield node.lineno
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and _names_gpu(key) and _has_figure(value):
                    yield key.lineno
        elif isinstance(node, ast.Tuple | ast.List):
            if any(map(_names_gpu, node.elts)) and any(map(_has_figure, node.elts)):
                yield node.lineno
        elif isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(map(_names_gpu, arguments)) and any(map(_has_figure, arguments)):
                yield node.lineno


def _number(node: ast.AST) -> float | None:
    return node.value if isinstance(node, ast.Constant) and type(node.value) in (int, float) else None


def _names_gpu(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(GPU_NAME.search(node.value))


def _has_figure(node: ast.AST) -> bool:
    """A number as TFLOP/s and GB/s are, alone or in a tuple or dict; core counts are smaller, cache sizes larger."""
    return any(150 < (_number(inner) or 0) < 20_000 for inner in ast.walk(node))


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "exec", "eval", "builtins.exec", "builtins.eval", "os.system", "os.popen",
    "torch.save", "pickle.load", "pickle.loads", "pickle.Unpickler",
}  # fmt: skip


WRITES_TENSORS = (  # of another program, in its format, which is torch's
    "gptfast/hf/nanochat.py", "tests/test_hf_nanochat.py", "tests/test_hf_nanogpt.py",
)  # fmt: skip


def nothing_is_executed_or_unpickled(page: Page) -> Iterator[int]:
    """No pickle, exec, eval or shell, and none by the back door: torch.load, torch.save, numpy's allow_pickle.

    Where another program wants torch's files they may be written, and read with weights_only.
    """
    for found in imports(page):
        is_bait = page.package == "tests" and found.name == "pickle"  # written to show that nobody opens it
        if found.name.split(".")[0] in FORBIDDEN_MODULES and not is_bait:
            yield found.line
    for node in ast.walk(page.tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = dotted(node.func)
        if called in FORBIDDEN_CALLS and not (called == "torch.save" and page.path in WRITES_TENSORS):
            yield node.lineno
        elif called == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno
        elif keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            yield node.lineno


def pages_are_short(page: Page) -> Iterator[int]:
    """A page over 600 lines becomes a package at the same import path."""
    if page.source.count("\n") > LONGEST_PAGE:
        yield LONGEST_PAGE + 1


def functions_are_short(page: Page) -> Iterator[int]:
    """A function over 60 lines does more than one thing. Kernels and tests are exempt."""
    if page.package in ("kernels", "tests"):
        return
    for node in ast.walk(page.tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno >= LONGEST_FUNCTION
        ):
            yield node.lineno


def no_test_elsewhere(page: Page) -> Iterator[int]:
    """Tests stand in tests/; bench/ may hold pytest-benchmark cases, which take the `benchmark` fixture."""
    if page.package == "tests":
        return
    for node in ast.walk(page.tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            arguments = {argument.arg for argument in node.args.args}
            if page.package != "bench" or "benchmark" not in arguments:
                yield node.lineno


def results_are_not_code(page: Page) -> Iterator[int]:
    """results/ is written by bench and train, and imported by nobody."""
    for found in imports(page):
        if found.name.split(".")[0] == "results":
            yield found.line


Rule = Callable[[Page], Iterator[int]]
# rule -> (path, an offence, an honest neighbour), the last two as source
PLANTED: dict[Rule, list[tuple[str, str, str]]] = {
    imports_go_one_way: [
        ("train/trainer.py", "from bench import timing", "from gptfast import data"),
        ("bench/model.py", "import train.trainer", "import gptfast.model"),
        ("gptfast/model.py", "def f():\n    from train.trainer import train", "import kernels"),
        ("kernels/op.py", "import gptfast.mfu", "import torch"),
        ("kernels/op.py", "from .. import gptfast", "from . import _triton"),
    ],
    kernels_need_only_torch_and_triton: [
        ("kernels/rotary.py", "import numpy", "import math"),
        ("kernels/proof/aot.py", "def f():\n    import pandas", "def f():\n    import json"),
    ],
    triton_has_one_door: [
        ("kernels/layernorm.py", "import triton.language as tl", "from ._triton import tl"),
        ("gptfast/engine.py", "def f():\n    import triton", "import torch"),
    ],
    ops_do_not_import_ops: [
        ("kernels/rmsnorm.py", "from .layernorm import TILES", "from .prims import row_sum"),
        ("kernels/rmsnorm.py", "from . import OPS", "from . import op"),
        ("kernels/attention/forward.py", "from ..rotary import rotary_reference", "from .masks import causal"),
        ("kernels/attention/__init__.py", "from ..rotary import rotary_reference", "from .forward import forward"),
    ],
    heavy_imports_wait: [
        ("gptfast/rows.py", "import matplotlib.pyplot as plt", "def f():\n    import matplotlib.pyplot as plt"),
        ("gptfast/cli.py", "import tyro", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tyro"),
    ],
    only_parallel_is_distributed: [
        ("train/trainer.py", "import torch.distributed as dist", "import torch.nn"),
        ("gptfast/optim.py", "import torch\ntorch.distributed.barrier()", "import torch\ntorch.zeros(1)"),
        ("gptfast/model.py", "from torch import distributed", "from torch import nn"),
        ("gptfast/model.py", "from torch.distributed.tensor import DTensor", "from torch.distributions import Normal"),
    ],
    the_environment_has_two_readers: [
        ("train/trainer.py", "import os\nos.environ['X'] = '1'", "import os\nos.cpu_count()"),
        ("bench/timing.py", "from os import getenv", "from os import fspath"),
        ("gptfast/log.py", "import os\nos.getenv('HOST')", "import os\nos.fsync(0)"),
    ],
    only_mfu_holds_peaks: [
        ("bench/model.py", "PEAK = 312e12", "TERA = 1e12"),
        ("bench/model.py", "PEAK = 989 * 1e12", "share = flops / 1e12"),
        ("train/trainer.py", "PEAKS = {'H100 SXM': 989}", "ARCH = {'H100': 90}"),
        ("bench/plots.py", "LINES = [('NVIDIA A100', 312, 2039)]", "LINES = [('A100', 'dashed', 80)]"),
        ("kernels/proof/aot.py", "Chip('A100', 19.5, 1555)", "Chip('A100', 108, 167936)"),
        ("bench/plots.py", "Peak('B200', bf16=2250)", "peak('B200')"),
    ],
    nothing_is_executed_or_unpickled: [
        ("gptfast/data.py", "import pickle", "import json"),
        ("train/config.py", "exec(open('config.py').read())", "model.eval()"),
        ("train/config.py", "eval('1')", "ast.literal_eval('1')"),
        ("gptfast/hf.py", "import torch\ntorch.load('x')", "import torch\ntorch.load('x', weights_only=True)"),
        ("gptfast/hf.py", "import torch\ntorch.save({}, 'x')", "save_file({}, 'x')"),
        ("gptfast/hf/nanochat.py", "import torch\ntorch.load('x')", "import torch\ntorch.save({}, 'x')"),
        ("gptfast/data.py", "np.load('x', allow_pickle=True)", "np.load('x')"),
        ("gptfast/log.py", "subprocess.run('git log', shell=True)", "subprocess.run(['git', 'log'])"),
        ("tests/test_data.py", "from pickle import loads", "from json import loads"),
        ("tests/test_data.py", "import pickle\npickle.loads(b'')", "import pickle\npickle.dumps(bait)"),
    ],
    pages_are_short: [("gptfast/model.py", "x = 1\n" * 601, "x = 1\n" * 600)],
    functions_are_short: [
        ("gptfast/model.py", "def f():\n" + "    x = 1\n" * 60, "def f():\n" + "    x = 1\n" * 59),
        ("bench/ops.py", "async def f():\n" + "    x = 1\n" * 60, "x = 1\n" * 100),
    ],
    no_test_elsewhere: [
        ("gptfast/model.py", "def test_forward(): ...", "def forward(): ..."),
        ("bench/test_ops.py", "def test_speed(): ...", "def test_speed(benchmark): ..."),
    ],
    results_are_not_code: [("bench/plots.py", "from results import rows", "import json")],
}  # fmt: skip


def pages() -> list[Page]:
    return [
        Page(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for package in MAY_IMPORT
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    offences = [f"{page.path}:{line}" for page in pages() for line in rule(page)]
    assert not offences, f"{rule.__doc__}\nbroken at: {', '.join(offences)}"


PLANTED_CASES = [(rule, *case) for rule, cases in PLANTED.items() for case in cases]


@pytest.mark.parametrize(("rule", "path", "offence", "honest"), PLANTED_CASES)
def test_rule_sees(rule: Rule, path: str, offence: str, honest: str) -> None:
    assert list(rule(Page(path, offence)))
    assert not list(rule(Page(path, honest)))


def circles(sources: list[Page]) -> list[str]:
    """Modules that import each other, wherever in the page the import stands, save under TYPE_CHECKING."""
    known = {page.module for page in sources}
    uses: dict[str, set[str]] = {}
    for page in sources:
        names = {found.name for found in imports(page) if not found.for_types and found.name in known - {page.module}}
        # `from a import b` where a.b is a page needs a only as its folder
        uses[page.module] = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    while free := {name for name, used in uses.items() if not used & uses.keys()}:
        uses = {name: used for name, used in uses.items() if name not in free}
    return sorted(name for name in uses if any(name in used for used in uses.values()))


def test_imports_go_in_no_circle() -> None:
    planted = [Page("gptfast/a.py", "def f():\n    import gptfast.b"), Page("gptfast/b.py", "from gptfast.a import f")]
    assert circles(planted) == ["gptfast.a", "gptfast.b"]
    honest = Page("gptfast/b.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gptfast.a")
    assert circles([planted[0], honest]) == []
    assert circles([page for page in pages() if page.package != "tests"]) == []


def test_every_package_has_pages() -> None:
    assert {page.package for page in pages()} == set(MAY_IMPORT)


# ---- the repository as a whole ---------------------------------------------------------------------------------------


def tracked() -> list[str]:
    """Paths in the repository; in a tree without git, all files that are no one's cache."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path.as_posix() for path in found if path.parts[0] in TOP_LEVEL and "__pycache__" not in path.parts]


def strangers(names: list[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names} - TOP_LEVEL)


def test_the_top_level_is_fixed() -> None:
    assert strangers(["notes.txt", "scripts/run.sh", "kernels/op.py"]) == ["notes.txt", "scripts"]
    assert not strangers(tracked())


def test_results_hold_no_code() -> None:
    assert not [name for name in tracked() if name.startswith("results/") and name.endswith(".py")]


SHARED = "../" + "shared"  # written in halves, so that this page does not find itself
PRIVATE_PATH = re.compile(rf"{re.escape(SHARED)}\b|(?<![\w.])/(work|root|home|tmp)/\w")


def private_lines(name: str, text: str) -> list[str]:
    """Lines that name a folder of one machine. A test may, if it skips where the folder is absent."""
    if name.startswith("tests/") and "skip" in text:
        return []
    lines = enumerate(text.splitlines(), 1)
    return [f"{name}:{number}" for number, line in lines if PRIVATE_PATH.search(line)]


def test_no_path_that_a_user_does_not_have() -> None:
    assert private_lines("README.md", f"see {SHARED}/data\n") == ["README.md:1"]
    assert not private_lines("README.md", "see networks/homework/gpt")
    assert private_lines("tests/test_data.py", f"open('{SHARED}')")
    assert not private_lines("tests/test_data.py", f"pytest.mark.skipif(not exists('{SHARED}'), reason='absent')")
    offences = []
    for name in tracked():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            offences += private_lines(name, content.decode("utf-8"))
    assert not offences


def paths_of_the_plan(text: str) -> list[str]:
    """The paths of DESIGN.md's tree: each line stands in the folder above it that is indented less."""
    found: list[str] = []
    folders: list[tuple[int, str]] = []  # those that the line stands in: their indent and path
    for line in re.search(r"```\n(.*?)```", text, re.S).group(1).splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        folders = [(outer, path) for outer, path in folders if outer < indent]
        found.append((folders[-1][1] if folders else "") + name)
        folders.append((indent, found[-1]))
    return found


def test_the_plan_names_what_there_is() -> None:
    plan = paths_of_the_plan((ROOT / "DESIGN.md").read_text(encoding="utf-8"))
    assert len(plan) > 30 and {"kernels/op.py", "kernels/proof/aot.py"} <= set(plan)
    assert not [path for path in plan if not (ROOT / path).exists()]
    pages = {path.split("/")[0] for path in tracked() if path.endswith(".py")}
    assert pages <= {path.rstrip("/") for path in plan}
