"""Hugging Face's package `kernels` in front of ours is told at import, in one line, with both paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("how", ["import", "command"])
def test_a_package_of_the_same_name_is_named(how: str, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise AssertionError('theirs was imported')\n")
    (tmp_path / "run.py").write_text(
        f"import sys, runpy\nsys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        + ("import gptfast" if how == "import" else "sys.argv[:] = ['-m']; sys.orig_argv[:] = "
           "['python', '-m', 'gptfast.sample']\nimport gptfast")
    )  # fmt: skip
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and str(tmp_path / "kernels" / "__init__.py") in last and str(ROOT / "kernels") in last
    assert last.startswith("ImportError: gptfast needs" if how == "import" else "error: gptfast needs")
    assert how == "import" or len(done.stderr.splitlines()) == 1
