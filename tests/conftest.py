"""What tests share: seeded randomness, text to train on, and the rules of when a test may be skipped.

`gpu` tests are skipped where there is no CUDA device. A missing Triton is no reason to skip on Linux: there it is a
dependency, and a test that needs it fails.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

FUZZ_EXAMPLES = 50
pytest.register_assert_rewrite("browsing")  # a plugin of the web page's tests, which import it too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=FUZZ_EXAMPLES,
        help="random cases per op in the fuzz tests; another number than %(default)s also draws new cases at every run",
    )
    parser.addoption("--chaos", action="store_true", help="the long form of the tests of kills, signals and damage")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # commands inherit it, and tests press Ctrl-C
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "triton: needs Triton; fails without it on Linux, skipped elsewhere")
    fixed = config.getoption("--fuzz-examples") == FUZZ_EXAMPLES
    settings.register_profile("gptfast", deadline=None, derandomize=fixed, print_blob=True)
    settings.load_profile("gptfast")


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # a collection takes a quarter of a second with all modules in it, and no time without


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("triton") and importlib.util.find_spec("triton") is None:
        if sys.platform == "linux":
            pytest.fail("Triton is not installed: pip install -c constraints.txt triton")
        pytest.skip(f"there is no Triton for {sys.platform}")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()  # workers share the GPU


@pytest.fixture(scope="session")
def fuzz_examples(pytestconfig: pytest.Config) -> int:
    """How many random cases a fuzz test draws for one op: `--fuzz-examples`."""
    return pytestconfig.getoption("--fuzz-examples")


@pytest.fixture(scope="session")
def chaos(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """chaos(short, long): how often a test of random faults tries; `long` with --chaos."""
    return lambda short, long: long if pytestconfig.getoption("--chaos") else short


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it on this worker."""
    torch.manual_seed(1337)
    random.seed(1337)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator of its own, for tests that draw tensors between things that draw from the global one."""
    return torch.Generator().manual_seed(1337)


@pytest.fixture(scope="session")
def text() -> str:
    """Some 40,000 characters with words, lines and punctuation to learn, the same at every run."""
    draw = random.Random(1337)
    syllables = ["la", "the", "ri", "no", "sha", "ke", "mo", "ver", "an", "to", "un", "ish", "el", "qu", "or", "day"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, 9))).capitalize() + draw.choice([".", "!", "?", ";"])

    lines: list[str] = []
    while sum(map(len, lines)) < 40_000:
        lines.append(f"{sentence()}\n")
    return "".join(lines)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch.compile has made in this test; each runs as it is."""
    found: list[Any] = []
    compile = torch.compile

    def backend(graph: Any, example: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(f, dynamic=dynamic, backend=backend))
    torch.compiler.reset()
    return found
