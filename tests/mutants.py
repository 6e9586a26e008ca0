"""A page with one mistake, loaded beside the real one: what shows that a test can fail."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


def mutated(page: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page with `old` changed to `new` where it first stands, as a module of its own until the test ends."""
    source = Path(page.__file__).read_text()
    assert old in source, "the page has changed: rewrite this mutant"
    path = folder / "mutant.py"
    unique = "mutant" + re.sub(r"\W", "", str(folder))  # torch keeps one operator of a name
    source = re.sub(r'((?:differentiable|without_gradient)\(\s*")', rf"\g<1>{unique}_", source)
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(f"{page.__package__}.mutant", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look up the module that they are in
    spec.loader.exec_module(module)
    return module
