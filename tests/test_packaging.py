"""What a newcomer installs: declared, pinned, light to import, and an installer that says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from test_floorplan import MAY_IMPORT, ROOT, imports, pages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULE_OF = {
    "nvidia-ml-py": "pynvml", "pytest-xdist": "xdist", "pytest-benchmark": "pytest_benchmark", "pyyaml": "yaml",
}  # fmt: skip
# used when a run asks for it, by those who have it; and what ops are timed beside where it is installed
OPTIONAL = {"wandb", "flash_attn", "flash_attn_interface", "liger_kernel", "quack"}
BARE_MACHINE = {
    "tyro",
    "datasets",
    "tiktoken",
    "tokenizers",
    "transformers",
    "safetensors",
    "hypothesis",
}  # absent there


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


def declared() -> set[str]:
    return names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, version in exact}


def test_every_import_is_declared() -> None:
    modules = (
        {MODULE_OF.get(name, name) for name in declared()} | set(sys.stdlib_module_names) | set(MAY_IMPORT) | OPTIONAL
    )
    siblings = {path.stem for path in (ROOT / "tests").glob("*.py")}
    missing = {
        f"{found.name.split('.')[0]} ({page.path})"
        for page in pages()
        for found in imports(page)
        if found.name.split(".")[0] not in modules | (siblings if page.package == "tests" else set())
    }
    assert not missing, f"not in pyproject.toml: {', '.join(sorted(missing))}"


def test_every_dependency_is_pinned() -> None:
    assert not declared() - set(pins())


def test_torch_and_triton_belong_together() -> None:
    """The CUDA build of this torch requires exactly this triton; the CPU build requires none, so both are named."""
    assert (pins()["torch"], pins()["triton"]) == ("2.13.0", "3.7.1")


def test_pins_satisfy_what_they_require() -> None:
    """The constraints are a closed set: whatever an installed pin requires here is pinned too."""
    holes = set()
    for name in pins():
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # pinned for another platform
            continue
        holes |= {
            f"{child} (for {name})" for child in names([r for r in required if ";" not in r]) if pin(child) is None
        }
    assert not holes


def pin(name: str) -> str | None:
    """Package names compare without regard to case, hyphen, underscore and dot."""
    by_name = {re.sub(r"[-_.]+", "-", key): version for key, version in pins().items()}
    return by_name.get(re.sub(r"[-_.]+", "-", name))


def test_a_bare_machine_can_import_the_library_and_the_bench() -> None:
    """torch, triton, numpy, pandas, matplotlib and pytest are there; tyro, datasets, safetensors are not."""
    modules = ["gptfast.config", "gptfast.model", "gptfast.mfu", "gptfast.log"]
    modules += [page.module for page in pages() if page.package in ("kernels", "bench") and "__main__" not in page.path]
    program = (
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({sorted(BARE_MACHINE)}))\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- make setup ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with nothing but the installer and what it reads, and a `bin` of stand-ins for the programs it calls."""
    for name in (".ci/setup", "pyproject.toml", "constraints.txt"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(checkout: Path, name: str, script: str) -> Path:
    program = checkout / "bin" / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def setup(checkout: Path, python: str | Path = "", path: str | None = None) -> subprocess.CompletedProcess[str]:
    path = path or f"{checkout / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": str(python)}
    command = ["/bin/sh", ".ci/setup"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def refuses(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line says what is missing, and no traceback."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("setup: error: ") and "Traceback" not in done.stderr
    assert all(word in last for word in words), last


def test_setup_without_a_python(checkout: Path) -> None:
    for tool in ("dirname", "awk", "df"):
        stand_in(checkout, tool, f'exec {shutil.which(tool)} "$@"')
    refuses(setup(checkout, path=str(checkout / "bin")), "no Python 3.11", "PYTHON=")


def test_setup_with_an_old_python(checkout: Path) -> None:
    refuses(setup(checkout, stand_in(checkout, "python3.9", "exit 1")), "python3.9", "3.11")


def test_setup_without_venv(checkout: Path) -> None:
    python = stand_in(checkout, "python", 'case "$2" in *venv*) exit 1;; esac')
    refuses(setup(checkout, python), "no venv module", "python3-venv")


def test_setup_without_disk(checkout: Path) -> None:
    stand_in(checkout, "df", "echo header; echo disk 100 90 1048576 90% /")
    refuses(setup(checkout, sys.executable), "1 GB free", "4 GB")


def test_setup_leaves_a_linked_environment_alone(checkout: Path) -> None:
    (checkout / "theirs" / "bin").mkdir(parents=True)
    (checkout / ".venv").symlink_to("theirs")
    shutil.copy(stand_in(checkout, "good", "touch touched"), checkout / "theirs" / "bin" / "python")
    refuses(setup(checkout), ".venv is a link to theirs", "others use", "remove the link")
    assert not (checkout / "touched").exists()


def test_setup_when_pip_fails(checkout: Path) -> None:
    stand_in(checkout, "df", "echo header; echo disk 100 0 104857600 0% /")
    stand_in(checkout, "made", 'case "$*" in *install*) echo "no such version" >&2; exit 1;; esac')
    makes_one = "mkdir -p .venv/bin; cp bin/made .venv/bin/python"
    python = stand_in(checkout, "python", f"case \"$*\" in '-m venv'*) {makes_one};; esac")
    done = setup(checkout, python)
    assert "no such version" in done.stderr
    refuses(done, "pip could not install", "100 GB are free")


def test_setup_keeps_a_good_environment(checkout: Path) -> None:
    (checkout / ".venv/bin").mkdir(parents=True)
    good = stand_in(checkout, "good", 'echo "$@" >> calls')
    (checkout / ".venv/bin/python").write_bytes(good.read_bytes())
    (checkout / ".venv/bin/python").chmod(0o755)
    done = setup(checkout, good)
    calls = (checkout / "calls").read_text()
    assert done.returncode == 0, done.stderr
    assert "using .venv" in done.stdout and "ready" in done.stdout
    assert "-m venv" not in calls and "-c constraints.txt -e .[data,hf,chat,serve,dev]" in calls
