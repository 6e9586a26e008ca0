"""The tools that a model may call in its answers: a calculator, and Python where a sandbox can be had.

    Tools().run("12*7")                             "84"
    Tools().run("'strawberry'.count('r')")          "3"
    Tools(python=Sandbox()).run("print(2**10)")     "1024\n", in a process of its own

The calculator reads the syntax tree of one expression and knows nothing else: numbers, + - * / // %, brackets, and
'text'.count('part'). Its work is bounded by its size, so it needs no clock and runs in any thread.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptfast.chat.sandbox import Sandbox

LONGEST_EXPRESSION = 500  # characters
DEEPEST = 50  # operations within one another
LARGEST_INTEGER = 10**100  # in magnitude, at every step

Number = int | float
BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class NotCalculable(ValueError):
    """The expression is none that the calculator knows, or its value is out of bounds."""


@dataclass(frozen=True)
class Tools:
    """What becomes of a call. `python` None: whatever the calculator cannot do has no output."""

    calculator: bool = True
    python: Sandbox | None = None

    def run(self, call: str) -> str | None:
        """The output of `call`, or None if there is none to be had."""
        output = self.calculated(call)
        return self.executed(call) if output is None and self.python is not None else output

    def calculated(self, call: str) -> str | None:
        """The output of `call` if the calculator knows it, in microseconds."""
        return calculate(call) if self.calculator else None

    def executed(self, call: str) -> str:
        """What `call` prints as Python, within the sandbox's limits of time."""
        assert self.python is not None
        try:
            return self.python.run(call).text
        except OSError as error:  # no process to be had: the model is told, and all else goes on
            return f"Python could not run: {error.strerror}"


def calculate(expression: str) -> str | None:
    """The value of an expression as Python prints it, or None if it is not one or beyond the bounds.

    Commas within a number (1,000) are left out, as nanochat does.
    """
    expression = expression.strip()
    if not expression or len(expression) > LONGEST_EXPRESSION:
        return None
    is_text = '"' in expression or "'" in expression
    try:
        tree = ast.parse(expression if is_text else expression.replace(",", ""), mode="eval")
        value = _value(tree.body, 0)
    except (NotCalculable, SyntaxError, ArithmeticError, ValueError, MemoryError, RecursionError):
        return None
    return str(value)


def _value(node: ast.expr, depth: int) -> Number:
    if depth > DEEPEST:
        raise NotCalculable("too deep")
    match node:
        case ast.Constant(value=int(value) | float(value)) if not isinstance(value, bool):
            return _bounded(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _bounded(BINARY[type(op)](_value(left, depth + 1), _value(right, depth + 1)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand, depth + 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise NotCalculable(type(node).__name__)


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise NotCalculable("too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise NotCalculable("not finite")
    return value
