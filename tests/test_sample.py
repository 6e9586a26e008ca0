"""Sampling: from text to a trained model to text again, without the data set; and the arithmetic of a draw."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import kernels
from gptfast import cli, sample
from gptfast.config import GPTConfig
from gptfast.model import GPT
from train import pretrain
from train.prepare import prepare

PANGRAM = "the quick brown fox jumps over a lazy dog. "


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned one sentence by heart; its data set is gone."""
    folder = tmp_path_factory.mktemp("fox")
    (folder / "text.txt").write_text(PANGRAM * 100)
    prepare("fox", folder / "data", folder / "text.txt")
    flags = [
        "--device=cpu", "--compile=False", "--block_size=16", "--batch_size=16", "--gradient_accumulation_steps=1",
        "--n_layer=1", "--n_head=2", "--n_embd=32", "--max_iters=120", "--eval_interval=120", "--eval_iters=2",
        "--warmup_iters=5", "--lr_decay_iters=120", "--learning_rate=1e-2", "--dataset=fox", "--log_interval=50",
        "--dtype=float32", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}",
    ]  # fmt: skip
    assert cli.run(pretrain.main, flags) == 0
    shutil.rmtree(folder / "data")
    return folder / "out"


def run(out_dir: Path, *flags: str) -> int:
    return cli.run(sample.main, [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *flags])


def texts(printed: str) -> list[str]:
    """The samples in what was printed."""
    return printed.split("number of parameters: ")[1].split("\n", 1)[1].split(f"\n{sample.SEPARATOR}\n")[:-1]


def test_a_trained_model_says_what_it_learned(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out_dir, "--start=the quick", "--num_samples=2", "--max_new_tokens=40", "--temperature=0") == 0
    expected = (PANGRAM * 3)[: len("the quick") + 40]  # longer than block_size, so the window slides
    assert texts(capsys.readouterr().out) == [expected, expected]


def test_a_seed_repeats_and_another_differs(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--start=a ", "--num_samples=3", "--max_new_tokens=30", "--temperature=3")
    drawn = []
    for seed in (1, 1, 2):
        assert run(out_dir, *flags, f"--seed={seed}") == 0
        drawn.append(texts(capsys.readouterr().out))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert all(text.startswith("a ") and len(text) == 32 for text in drawn[0])


def test_a_prompt_from_a_file(out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("fox jum")
    assert (
        run(
            out_dir,
            f"--start=FILE:{tmp_path / 'prompt.txt'}",
            "--num_samples=1",
            "--max_new_tokens=4",
            "--temperature=0",
        )
        == 0
    )
    assert texts(capsys.readouterr().out) == ["fox jumps o"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--start=dögs", "character 'ö'"),
        ("--start=\n", r"character '\n'"),
        ("--start=", "--start is empty"),
        ("--start=FILE:/nowhere/prompt", "--start=FILE:/nowhere/prompt: cannot read it"),
        ("--out_dir=/nowhere", "no checkpoint in /nowhere"),
        ("--init_from=gpt5", "--init_from=gpt5: no such folder"),
        ("--num_samples=0", "--num_samples=0: must be at least 1"),
        ("--temperature=-1", "--temperature=-1.0: must not be negative"),
        ("--top_p=1", "unknown flag --top_p; did you mean --top_k?"),
    ],
)
def test_mistakes_are_one_line(out_dir: Path, flag: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(out_dir, flag) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_defaults_are_nanogpts() -> None:
    defaults = sample.Sample()
    assert (defaults.init_from, defaults.out_dir, defaults.start) == ("resume", "out", "\n")
    assert (defaults.num_samples, defaults.max_new_tokens, defaults.temperature) == (10, 500, 0.8)
    assert (defaults.top_k, defaults.seed, defaults.device, defaults.compile) == (200, 1337, "cuda", False)


# ---- one draw


def test_draws_follow_the_softmax_of_the_top_k() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0, 4.0]]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, 0), (1.0, 9), (2.0, 2)):
        tokens = sample.draw(logits, temperature, top_k, generator)
        share = torch.bincount(tokens.flatten(), minlength=4) / 20_000
        z = logits[0] / temperature
        if top_k == 2:
            z = z.masked_fill(torch.tensor([True, False, True, False]), float("-inf"))
        torch.testing.assert_close(share, z.softmax(0), atol=0.015, rtol=0)  # 4 standard deviations of a share
    assert sample.draw(logits, 0, 0, generator).unique().tolist() == [3]
    assert sample.draw(logits, 1.0, 1, generator).unique().tolist() == [3]


def test_generate_continues_each_row_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, dropout=0.5), kernels.load("reference")
    )
    start = torch.randint(11, (3, 5))
    state = torch.get_rng_state()
    tokens = sample.generate(model, start, 10, top_k=5, generator=torch.Generator().manual_seed(1))
    assert tokens.shape == (3, 15)
    assert torch.equal(tokens[:, :5], start)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())  # no dropout, and every draw from the generator given
    greedy = sample.generate(model, start, 10, temperature=0)
    model.eval()
    for t in range(5, 15):
        expected = model.logits(greedy[:, max(0, t - 8) : t])[:, -1].argmax(-1)
        assert torch.equal(greedy[:, t], expected)
