"""The calculator: what it knows, what it refuses, and that nothing it is given can hold it up."""

from __future__ import annotations

import threading

import pytest

from gptfast.chat.tools import DEEPEST, Tools, calculate

KNOWN = {
    "12*7": "84", " 2 + 2 ": "4", "7/2": "3.5", "6/3": "2.0", "7//2": "3", "7%4": "3", "-3+1": "-2", "+4": "4",
    "(1+2)*3": "9", "1,000*2": "2000", "0.5*8": "4.0", "2*-3": "-6", "1e3+1": "1001.0",
    "'strawberry'.count('r')": "3", '"banana".count("an")': "2", "'a,b'.count(',')": "1",
    "99999999999*99999999999": str(99999999999**2),
}  # fmt: skip
REFUSED = [
    "", "   ", "x", "2**10", "10**10**10", "1/0", "5%0", "__import__('os')", "open('/etc/passwd')", "(1).__class__",
    "'a'.join('b')", "'a'.count", "'a'.count('a', 0)", "'a'.count(chr(97))", "'a'*1000", "'a'+'b'", "[1,2]",
    "1 if 1 else 2",
    "lambda: 0", "f'{1}'.count('1')", "b'a'.count(b'a')", "1 < 2", "not 1", "~1", "1 << 100", "True + 1", "1j*1j", "1+",
    "1;2", "print(1)", "a:=1", "'a'.count('a')()", "1e308*10", "9" * 400 + "*2", "\x00", "None", "...", "1 and 2",
    "'\ud800'.count('a'", "max(1,2)", "1\n2",
]  # fmt: skip


@pytest.mark.parametrize(("expression", "value"), KNOWN.items())
def test_it_knows(expression: str, value: str) -> None:
    assert calculate(expression) == value == Tools().run(expression)


@pytest.mark.parametrize("expression", REFUSED)
def test_it_refuses(expression: str) -> None:
    assert calculate(expression) is None


def test_every_step_is_bounded() -> None:
    """Of factors that each are small, the product stops at 100 digits; brackets and signs stop at a depth."""
    assert calculate("*".join(["99999"] * 20)) == str(99999**20) and calculate("*".join(["99999"] * 21)) is None
    assert calculate("-" * DEEPEST + "1") == "1" and calculate("-" * (DEEPEST + 1) + "1") is None
    assert calculate("(" * 240 + "1" + ")" * 240) is None and calculate("1+" * 250 + "1") is None
    assert calculate("1" * 10_000_000) is None


def test_any_thread_may_calculate() -> None:
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(calculate("6*7"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["42"] * 8
