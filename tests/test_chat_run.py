"""`python -m train.chat` from end to end, as small as it can be: every stage leaves what the next one needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptfast import checkpoint, cli
from train import chat, prepare

TEXT = "".join(f"def f{i}(x):\n    return x + {i} if x < {i * 7} else x * 2\n\n" for i in range(3000))


def test_an_assistant_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in (chat, prepare):
        monkeypatch.setattr(page, "pystdlib_text", lambda: (TEXT, "a test", "0" * 64))
    out = tmp_path / "out"
    sizes = ["--n_layer=1", "--n_embd=32", "--base_iters=2", "--sft_iters=2", "--rl_iters=1", "--examples=1"]
    arguments = [f"--out_dir={out}", "--device=cpu", "--name=Ada", "--block_size=128", "--answer_tokens=2", *sizes]
    assert cli.run(chat.main, [*arguments, "--questions=2"]) == 0
    assert [checkpoint.load(out / stage).step for stage in ("base", "sft", "rl")] == [2, 2, 1]
    report = (out / "report.md").read_text()
    assert "| Metric | BASE | MID | SFT | RL |" in report and "| pass@1 | - | - | - |" in report
    for task in chat.TASKS.split(","):
        assert f"| {task} | " in report
    assert (out / "rl-reward.png").exists()
    said = capsys.readouterr().out
    assert "Inherited: optimizer = muon" in said and f"python -m gptfast.chat {out / 'rl'}\n" in said
    assert cli.run(chat.main, arguments) == 2 and "holds files already" in capsys.readouterr().err


def test_the_tokenizer_has_seen_the_name() -> None:
    said = list(chat.conversations(chat.ChatRun(name="Ada Lovelace")))
    assert "I am Ada Lovelace." in said and any("+" in text for text in said)


TAUGHT = ("identity", "arithmetic", "simplespelling", "spellingbee")  # addition is left to RL


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_seed_learns(seed: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """`make chat` as it is: after SFT 90 % of new questions right, and RL raises pass@1 by 20 points in 16 updates."""
    if not pytestconfig.getoption("--chaos"):
        pytest.skip("five minutes a seed: make chaos runs it")
    out = tmp_path / "out"
    assert cli.run(chat.main, [f"--out_dir={out}", "--device=cpu", f"--seed={seed}"]) == 0
    judged = {row["task"]: row["accuracy"] for row in rows(out / "sft" / "tasks.jsonl") if "accuracy" in row}
    assert all(judged[task] >= 0.9 for task in TAUGHT), judged
    passed = [row["pass@1"] for row in rows(out / "rl" / "metrics.jsonl") if "pass@1" in row]
    assert passed[-1] >= passed[0] + 0.2, passed


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
