"""Learning from rewards: the loss by hand, what gets no gradient, pass@k of rigged samplers, and answers as rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import kernels
from gptfast.chat.answers import Answers
from gptfast.chat.conversation import Chat
from gptfast.config import GPTConfig
from gptfast.engine import Engine, Sampling
from gptfast.model import GPT, IGNORED
from train.policy import Rollout, advantages_of, batch_of, nll, objective, pass_at_k, roll_out, seed_of
from train.tasks import TASKS, Where
from train.tokenizer import train_bpe

ROLLOUTS = [
    Rollout([1, 2], [5, 6, 7], [1, 0, 1], "", 1.0),
    Rollout([1, 2], [8], [1], "", 0.0),
    Rollout([1, 2], [9, 9], [1, 1], "", 0.0),
]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_bpe(["0+1=2 3+4=7 5+6=11 8+9=17 the answer is " * 9], 272))


@pytest.fixture
def model(chat: Chat) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=272, n_layer=2, n_head=2, n_embd=32), kernels.load("reference"))


def test_rows_of_answers() -> None:
    """Prompt, tool output and padding are no targets; advantages are the rewards around their mean."""
    tokens, targets, advantages = batch_of(ROLLOUTS, padding=0)
    assert tokens.tolist() == [[1, 2, 5, 6], [1, 2, 8, 0], [1, 2, 9, 9]]
    _ = IGNORED
    assert targets.tolist() == [[_, 5, _, 7], [_, 8, _, _], [_, 9, 9, _]]
    assert advantages.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert advantages_of(rewards).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages_of(rewards, sigma=True).tolist() == [1.0, -1.0, -1.0, 1.0]
    for same in (torch.zeros(3), torch.ones(3)):
        assert not advantages_of(same).any() and not advantages_of(same, sigma=True).any()


def test_the_loss_is_the_formula() -> None:
    """- sum of log p (r - mean r) over the tokens that were drawn, over their number: five here."""
    _, targets, advantages = batch_of(ROLLOUTS, padding=0)
    nlls = torch.arange(12.0).view(3, 4)
    total, count = objective(nlls, targets, advantages)
    assert count == 5
    assert total.item() == pytest.approx((1 + 3) * 2 / 3 - 5 / 3 - (9 + 10) / 3)


def test_nll_is_minus_the_log_of_the_softmax(model: GPT) -> None:
    tokens, targets, _ = batch_of(ROLLOUTS, padding=0)
    found = nll(model, tokens, targets)
    p = model.logits(tokens).detach().double().softmax(-1)
    for b, t in itertools.product(range(3), range(4)):
        wanted = 0.0 if targets[b, t] == IGNORED else -math.log(p[b, t, targets[b, t]])
        assert found[b, t].item() == pytest.approx(wanted, abs=1e-5)


def gradient(model: GPT, advantages: torch.Tensor, **options: float) -> torch.Tensor:
    tokens, targets, _ = batch_of(ROLLOUTS, padding=0)
    model.zero_grad()
    total, count = objective(nll(model, tokens, targets), targets, advantages, **options)  # type: ignore[arg-type]
    (total / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_no_advantage_no_gradient(model: GPT) -> None:
    assert not gradient(model, torch.zeros(3)).any()
    assert gradient(model, torch.tensor([1.0, -0.5, -0.5])).any()


def test_on_the_policy_that_drew_the_ratio_changes_nothing(model: GPT) -> None:
    """PPO's ratio is 1 there and its gradient that of log p; past the clip there is none."""
    tokens, targets, advantages = batch_of(ROLLOUTS, padding=0)
    plain = gradient(model, advantages)
    old = nll(model, tokens, targets).detach()
    torch.testing.assert_close(gradient(model, advantages, old=old, clip=0.2), plain)
    assert not gradient(model, torch.ones(3), old=old + 1.0, clip=0.2).any()  # e times as likely as it was
    assert gradient(model, -torch.ones(3), old=old + 1.0, clip=0.2).any()


def test_the_reference_holds(model: GPT) -> None:
    tokens, targets, _ = batch_of(ROLLOUTS, padding=0)
    same = nll(model, tokens, targets).detach()
    torch.testing.assert_close(gradient(model, torch.zeros(3), reference=same, kl=1.0), torch.zeros(model_size(model)))
    for shift in (-0.5, 0.5):
        total, _ = objective(same, targets, torch.zeros(3), reference=same + shift, kl=1.0)
        assert total.item() == pytest.approx(5 * (math.exp(-shift) + shift - 1), rel=1e-5) and total > 0


def model_size(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def test_learning_makes_the_rewarded_answer_likelier(model: GPT) -> None:
    tokens, targets, advantages = batch_of(ROLLOUTS, padding=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    before = nll(model, tokens, targets).sum(1)
    for _ in range(10):
        total, count = objective(nll(model, tokens, targets), targets, advantages)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = nll(model, tokens, targets).sum(1)
    assert after[0] < before[0] and after[1] > before[1] and after[2] > before[2]


def test_pass_at_k_of_rigged_samplers() -> None:
    always, never, half = [True] * 8, [False] * 8, [True, False] * 4
    assert [pass_at_k([always, never], k) for k in (1, 4, 8)] == [0.5] * 3
    assert pass_at_k([half], 1) == 0.5 and pass_at_k([half], 5) == 1.0
    for k in range(1, 9):  # by counting all choices of k answers
        chosen = list(itertools.combinations(half, k))
        assert pass_at_k([half], k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    with pytest.raises(ValueError, match="k: expected 1 to 8"):
        pass_at_k([half], 9)


def test_rollouts_are_reproducible_for_any_number_of_samples(model: GPT, chat: Chat) -> None:
    """Fewer samples than slots, or more: the first answers are the same, and so are their rewards."""
    example = TASKS["addition"].examples("train", Where())[34]
    found = {}
    for samples, slots in ((3, 8), (5, 2)):
        answers = Answers(Engine(model, slots=slots, tokenizer=chat.tokenizer, weights="model"), chat)  # type: ignore[arg-type]
        rollouts = roll_out(
            answers, TASKS["addition"], example, samples=samples, sampling=Sampling(6, 1.0, 50), seed=seed_of(1, 2)
        )
        assert len(rollouts) == samples and all(len(r.ids) == len(r.drawn) <= 7 for r in rollouts)
        assert all(r.prompt == chat.prompt(example.messages) and r.reward in (0.0, 1.0) for r in rollouts)
        found[samples] = rollouts
    assert [r.ids for r in found[3]] == [r.ids for r in found[5][:3]]
    assert len({tuple(r.ids) for r in found[5]}) > 1


def test_seeds_differ_by_every_number() -> None:
    assert len({seed_of(a, b) for a in range(20) for b in range(20)}) == 400 and seed_of(1, 2) == seed_of(1, 2)
    assert all(0 <= seed_of(i) < 2**63 for i in range(50))
