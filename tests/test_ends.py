"""How every command ends when it is interrupted while it imports, or when nothing more can be printed: in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptfast import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    re.sub(r"\.__main__$", "", ".".join(path.relative_to(ROOT).with_suffix("").parts))
    for package in ("gptfast", "train", "bench", "kernels")
    for path in (ROOT / package).rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text("utf-8") and "run(main))" in path.read_text("utf-8")
)


def started(module: str, *arguments: str, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-X", "importtime", "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def test_every_command_is_known() -> None:
    assert {"train.pretrain", "gptfast.sample", "gptfast.hf", "bench", "kernels", "kernels.proof.aot"} <= set(PAGES)
    commands = set(PAGES) - {"gptfast.chat.jail"}  # which a sandbox starts, and nobody else
    assert all("run(main)" in (ROOT / page_of(module)).read_text("utf-8") for module in commands)


def page_of(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__main__.py"


@pytest.mark.parametrize("module", ["train.pretrain", "gptfast.sample", "kernels"])
@pytest.mark.parametrize("while_importing", ["gptfast", "numpy", "torch"])
def test_ctrl_c_while_importing_is_one_line(module: str, while_importing: str) -> None:
    """Sent as soon as Python tells that it has imported one of the first modules, or a part of the large ones."""
    while_importing = while_importing.replace("gptfast", "kernels._command" if module == "kernels" else "gptfast")
    running = started(module, "--help", stdout=subprocess.DEVNULL)
    assert running.stderr is not None
    lines = []
    for line in running.stderr:
        lines.append(line)
        if re.search(rf"\|\s+{while_importing}(\.\w+)*$", line):
            running.send_signal(signal.SIGINT)
            break
    rest = [line for line in [*running.stderr] if not line.startswith("import time:")]
    running.wait()
    assert rest == ["interrupted\n"], "".join(rest)
    assert running.returncode == 130


@pytest.mark.parametrize(("package", "runner"), [("bench", "gptfast.cli"), ("kernels", "kernels._command")])
def test_ctrl_c_while_a_running_command_imports_is_one_line(package: str, runner: str, tmp_path: Path) -> None:
    """Outside an import it is a KeyboardInterrupt; within, some libraries would swallow that or abort."""
    (tmp_path / "library.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    os.abort()\n"
    )
    code = f"""
import os, signal, sys
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", {package!r}]
import {runner}
sys.argv = ["command"]
def main(argv=None):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        import library
sys.exit({runner}.run(main))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(("module", "buffered"), [("bench", True), ("bench", False), ("kernels", True)])
def test_an_output_that_is_full_is_one_line(module: str, buffered: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", module, "--help"]
    with open("/dev/full", "w") as full:
        running = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stderr.splitlines() == ["error: cannot write the output: No space left on device"]
    assert running.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_output_is_not_taken_for_a_full_folder(tmp_path: Path) -> None:
    """A page that turns errors of writing its files into advice meets those of printing too."""
    code = """
import sys
from gptfast import cli
from train import prepare
sys.exit(cli.run(prepare.main, sys.argv[1:]))
"""
    (tmp_path / "a.txt").write_text("some text of more than a few characters\n" * 500)
    command = [sys.executable, "-u", "-c", code, "mine", "--source=a.txt", "--data_dir=data"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.stderr.splitlines() == ["error: cannot write the output: No space left on device"]
    assert done.returncode == 1


def test_a_closed_output_harms_no_file(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.close(1)
sys.stdout = None
from gptfast import cli
def main(argv):
    with open({str(tmp_path / "file")!r}, "w") as file:
        print("words"); os.write(1, b"stray"); file.write("content")
sys.exit(cli.run(main, []))
"""
    running = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (running.returncode, running.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == "content"


def test_an_error_of_a_file_is_not_taken_for_one_of_the_output() -> None:
    def main(argv: list[str]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cli.run(main, [])


def test_letters_that_the_terminal_lacks_are_written_otherwise() -> None:
    code = "import sys; from gptfast import cli; sys.exit(cli.run(lambda argv: print('na\\u00efve \\u00b1'), []))"
    running = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (running.returncode, running.stdout) == (0, "na\\xefve \\xb1\n"), running.stderr
