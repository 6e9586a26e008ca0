"""`python -m gptfast.serve` from a checkpoint: it says where, the README's lines work, and Ctrl-C ends it in time."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import served
from scripted import tiny

from gptfast import checkpoint, cli
from gptfast.runtime import threads_beside_requests
from gptfast.serve import __main__ as page

ROOT = Path(__file__).parent.parent
SLACK_S = 10.0  # that a busy machine may take over the time stated
SAID = re.compile(r"serving (\S+) at (http://127\.0\.0\.1:\d+); Ctrl-C ends it within ([\d.]+) s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny assistant."""
    model, out = tiny(served.tokenizer(), 256), tmp_path_factory.mktemp("served") / "rl"
    meta = {"model": dataclasses.asdict(model.config), "tokenizer": served.tokenizer().to_json()}
    checkpoint.save(out, step=1, model=model.state_dict(), optimizer={}, meta=meta)
    return out


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "gptfast.serve",
        f"--out_dir={folder}",
        "--port=0",
        "--device=cpu",
        "--dtype=float32",
    ]
    process = subprocess.Popen(
        [*command, "--grace_s=2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def said(process: subprocess.Popen[str]) -> re.Match[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := SAID.match(line):
            return found
    pytest.fail(f"it did not start: {''.join(lines)}")


def curls() -> list[list[str]]:
    """The curl lines of the README."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("curl ") and "127.0.0.1:8000" in line]


def run(words: list[str], url: str) -> str:
    """What curl prints; a stand-in where there is none, so that the README is held to its word everywhere."""
    words = [word.replace("http://127.0.0.1:8000", url) for word in words]
    if shutil.which("curl"):
        return subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True, check=True).stdout
    import urllib.request

    address = next(word for word in words if word.startswith("http"))
    data = words[words.index("-d") + 1].encode() if "-d" in words else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(request) as reply:
        return reply.read().decode()


def test_the_lines_of_the_readme_then_ctrl_c(process: subprocess.Popen[str], said: re.Match[str], folder: Path) -> None:
    name, url, ends_s = said.groups()
    assert name == str(folder)
    whole, streamed, plain, stats = (run(words, url) for words in curls())
    message = json.loads(whole)["choices"][0]
    assert message["message"]["role"] == "assistant" and message["finish_reason"] in ("stop", "length")
    assert streamed.startswith("data: {") and streamed.endswith("data: [DONE]\n\n")
    completion = json.loads(plain)["choices"][0]
    assert len(completion["logprobs"]["tokens"]) == len(completion["logprobs"]["top_logprobs"]) <= 20
    assert json.loads(stats)["model"] == name and json.loads(stats)["ended"]

    with served.until_it_answers(url, {"prompt": "Hello", "n": 16, "stream": True}) as answer:
        process.send_signal(signal.SIGINT)
        assert process.wait(float(ends_s) + SLACK_S) == 0
    assert answer[-1] == b"data: [DONE]\n"  # told to the end, and not cut
    assert process.stdout is not None and process.stdout.read().splitlines()[-1] == "ended"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out_dir=nowhere"], "nowhere"), (["--port=99999"], "must be 0 to 65535"),
        (["--slots=0"], "must be 1 to 1024"),
        (["--token_file=missing"], "cannot read it"), (["--token_file=short"], "at least 16"),
        (["--tmperature=1"], "did you mean --temperature?"), (["--host=256.0.0.1"], "choose another"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_mistakes_are_one_line(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abc\n")
    assert cli.run(page.main, ["--device=cpu", "--port=0", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from gptfast.serve.server import listen

    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        assert cli.run(page.main, [f"--port={taken.getsockname()[1]}"]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_who_may_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    open_to_all = page.guarded_by(page.Serve(host="0.0.0.0"))
    assert open_to_all.token is None and not open_to_all.hosts and "whoever reaches" in capsys.readouterr().out
    guarded = page.guarded_by(page.Serve(host="0.0.0.0", token_file=str(tmp_path / "token")))
    assert guarded.token == "0123456789abcdef" and not capsys.readouterr().out
    assert page.guarded_by(page.Serve(hosts="Box.local, x")).hosts == (
        "127.0.0.1",
        "localhost",
        "::1",
        "box.local",
        "x",
    )


def test_one_core_is_left_to_requests() -> None:
    assert [threads_beside_requests(cores) for cores in (1, 2, 8)] == [1, 1, 7]
