"""Pages with one mistake, loaded beside the real ones: what shows that a test can fail.

`mutated` makes the one that a test asks for; `mutants_of` makes all that a list of rules finds in some functions.
"""

import ast
import functools
import importlib.util
import itertools
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

_numbers = itertools.count()


def mutated(
    page: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch, of: ModuleType | None = None
) -> ModuleType:
    """The page with `old` changed to `new` where it first stands, as a module of its own until the test ends.

    If the page is part of a package, `of`, that is what comes back, with the changed page in it.
    """
    source = Path(page.__file__).read_text()
    assert old in source, "the page has changed: rewrite this mutant"
    return loaded(page, source.replace(old, new, 1), page if of is None else of, folder, monkeypatch)


def loaded(
    page: ModuleType, source: str, wanted: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The module `wanted` as it would be if the page's source were another, until the test ends.

    It is loaded once more under another name, and so are the modules through which it imports the page; all others
    are shared with the real ones.
    """
    root, *_ = page.__name__.partition(".")
    unique = f"mutant{next(_numbers)}"
    monkeypatch.setitem(sys.modules, unique, ModuleType(unique))
    between = _modules_between(page.__name__, wanted.__name__)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{root}.") and name not in between:
            monkeypatch.setitem(sys.modules, unique + name.removeprefix(root), module)
    for name in between:
        text = source if name == page.__name__ else Path(sys.modules[name].__file__).read_text()
        # torch keeps one operator of a name
        text = re.sub(r'((?:differentiable|without_gradient)\(\s*")', rf"\g<1>{unique}_", text)
        path = folder / f"{unique}{name.removeprefix(root)}.py"
        path.write_text(text)
        is_package = [str(folder)] if hasattr(sys.modules[name], "__path__") else None
        spec = importlib.util.spec_from_file_location(
            unique + name.removeprefix(root), path, submodule_search_locations=is_package
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look up the module that they are in
        spec.loader.exec_module(module)
    return module


@functools.cache
def _modules_between(page: str, wanted: str) -> list[str]:
    """The page, then those modules that import it and that `wanted` imports, each after all that it imports; `wanted`
    last.
    """
    between: list[str] = []
    reaches: dict[str, bool] = {page: True}

    def visit(name: str) -> bool:
        if name not in reaches:
            reaches[name] = False  # in a circle
            reached = [visit(imported) for imported in _imports(name)]
            reaches[name] = any(reached)
            if reaches[name]:
                between.append(name)
        return reaches[name]

    assert visit(wanted), f"{wanted} does not import {page}"
    return [page, *between]


@functools.cache
def _imports(name: str) -> list[str]:
    """The modules of its own library that a module imports, at its top."""
    module = sys.modules[name]
    package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
    found = []
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            base = f"{base}.{node.module}" if node.module else base
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [imported for imported in found if imported in sys.modules and imported.count(".")]


# ---- every mistake that a list of rules can make


class Mutant(NamedTuple):
    """A page's source with one mistake, and its name: the function, and the change amid what stands around it."""

    name: str
    source: str


OTHER_OPERATOR = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "%", ast.Mod: "//",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.And: "or", ast.Or: "and",
}  # fmt: skip
OTHER_FUNCTION = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "exp2": "exp", "log2": "log",
                  "exp": "exp2", "log": "log2", "cdiv": "max"}  # fmt: skip
FOR_SPEED = ("num_warps", "num_stages", "input_precision", "STAGES")  # keywords without a meaning on a CPU
KINDS = (r".*_ptr", r".*_stride_\w+", r"[A-Z]", r"[a-z]")  # names of one kind are taken for each other


def mutants_of(page: ModuleType, functions: Sequence[str]) -> list[Mutant]:
    """The page's mutants in these functions: one for each change that a rule finds to make.

    An operator or a function becomes its opposite; of a mask one part stays, of a load none; a number becomes another;
    a condition always or never holds; a sum keeps its last term; a store, a sum or a conversion is left out; a name is
    another of its kind. Conversions to int64 stay, since offsets past 2^31 have tests of their own, and so do those to
    fp32 and to the dtype of a pointer, most of which products and stores would do anyhow.
    """
    source = Path(page.__file__).read_bytes()
    starts = list(itertools.accumulate((len(line) for line in source.splitlines(keepends=True)), initial=0))
    tops = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    nodes = {name: node for name, node in tops.items() if isinstance(node, ast.FunctionDef)}
    for name, top in tops.items():
        nodes |= {f"{name}.{node.name}": node for node in top.body if isinstance(node, ast.FunctionDef)}
    mutants, seen = [], Counter[str]()
    for function in functions:
        for first, last, new in _changes(nodes[function], source, starts):
            old = source[first:last].decode()
            around = source[max(first - 24, 0) : first].decode(), source[last : last + 16].decode()
            before, after = around[0].rpartition("\n")[2].lstrip(), around[1].partition("\n")[0]
            name = f"{function}: {before}[{_short(old)} -> {_short(new)}]{after}".rstrip()
            seen[name] += 1
            name += f" #{seen[name]}" if seen[name] > 1 else ""
            mutants.append(Mutant(name, (source[:first] + new.encode() + source[last:]).decode()))
    return mutants


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:19]}..{text[-19:]}"


def _changes(function: ast.FunctionDef, source: bytes, starts: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """(first byte, last byte, what to write there) of each change."""

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        first, last = span(node)
        return source[first:last].decode()

    def between(left: ast.AST, right: ast.AST, operator: str) -> tuple[int, int, str]:
        """The operator that stands between two operands, brackets around them left alone."""
        first, last = span(left)[1], span(right)[0]
        gap = re.search(rb"[^\s()]+(?: not\b)?", source[first:last])
        return first + gap.start(), first + gap.end(), operator

    parameters = [a.arg for a in function.args.args if a.annotation is None or "constexpr" not in ast.unparse(a)]
    assigned = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    others: dict[str, str] = {}
    for kind in KINDS:
        alike = [name for name in dict.fromkeys([*parameters, *assigned]) if re.fullmatch(kind, name)]
        others.update(zip(alike, alike[1:] + alike[:1], strict=True))

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Attribute) and node.attr == "element_ty":
            return
        if not (isinstance(node, ast.keyword) and node.arg in FOR_SPEED):
            yield node
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    for node in itertools.chain.from_iterable(map(walk, function.body)):
        match node:
            case ast.BinOp(left, ast.BitAnd() | ast.BitOr(), right):
                yield *span(node), text(left)
                yield *span(node), text(right)
            case ast.BinOp(left, operator, right) if type(operator) in OTHER_OPERATOR:
                yield between(left, right, OTHER_OPERATOR[type(operator)])
            case ast.Compare(left, [operator], [right]) if type(operator) in OTHER_OPERATOR:
                yield between(left, right, OTHER_OPERATOR[type(operator)])
            case ast.BoolOp(operator, [left, right, *_]):
                yield between(left, right, OTHER_OPERATOR[type(operator)])
            case ast.UnaryOp(ast.USub() | ast.Not(), operand):
                yield *span(node), text(operand)
            case ast.Constant(value) if isinstance(value, (int, float)):
                yield *span(node), _other_number(value)
            case ast.If(test) | ast.IfExp(test=test):
                yield *span(test), "True"
                yield *span(test), "False"
            case ast.AugAssign(target, ast.Add() | ast.Sub() | ast.Mult(), value):
                yield *span(node), f"{text(target)} = {text(value)}"
                yield *span(node), "pass"
            case ast.Expr(ast.Call()):
                yield *span(node), "pass"
            case ast.Name(name, ast.Load()) if others.get(name, name) != name:
                yield *span(node), others[name]
            case ast.Call(ast.Attribute(value, attribute) as called, arguments):
                if attribute in OTHER_FUNCTION:
                    yield *span(called), f"{text(value)}.{OTHER_FUNCTION[attribute]}"
                if attribute == "load" and len(arguments) > 1:
                    yield *span(node), f"tl.load({text(arguments[0])})"
                if attribute == "where":
                    yield *span(node), f"({text(arguments[1])})"
                    yield *span(node), f"({text(arguments[2])})"
                if attribute in ("to", "contiguous", "expand", "t"):
                    given = text(node).removeprefix(text(value))
                    if not re.search("int64|float32|element_ty", given):  # see the docstring
                        yield *span(node), text(value)


def _other_number(value: int | float) -> str:
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    return "0.0" if value else "1.0"


class TooLong(BaseException):
    """It need not end."""


def verdict(run: Callable[[], None], caught: tuple[type[Exception], ...], seconds: float = 60.0) -> str:
    """How a mutant ended: 'caught' by an exception of these, 'survived', or that it 'does not run' to an end.

    A mutant that takes so many seconds of this process counts among those that do not.
    """

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        run()
    except caught:
        return "caught"
    except (Exception, TooLong) as error:
        return f"does not run: {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return "survived"
