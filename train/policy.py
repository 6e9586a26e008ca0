"""Policy-gradient learning: samples answers from the model, judges them, and makes them more or less likely.

    rollouts = roll_out(answers, task, example, samples=16, sampling=Sampling(256, 1.0, 50), seed=seed_of(...))
    tokens, targets, advantages = batch_of(rollouts, padding=chat.bos)
    loss, count = objective(nll(model, tokens, targets), targets, advantages)

nanochat's simplified GRPO (Shao et al., arXiv:2402.03300): on policy, no reference model and no clipping, the advantage
is the reward minus the mean over the answers to one question, and every token of an answer weighs the same:

    loss = - sum over answers b and tokens t of log p[b, t] · (r_b - mean r) / number of tokens

Options: advantages over their standard deviation (sigma); PPO's clipped ratio to the policy that drew the answers
(Schulman et al., arXiv:1707.06347); a penalty on the divergence from a reference, by the estimate
exp(d) - d - 1 with d = log q - log p (http://joschu.net/blog/kl-approx.html), which is never negative.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptfast.chat.answers import Answer, Answers, answer_all
from gptfast.chat.conversation import text_of
from gptfast.engine import Sampling
from gptfast.model import IGNORED
from train.tasks import Example, Task

SMALLEST_SIGMA = 1e-6  # below it all rewards are alike


@dataclass(frozen=True)
class Rollout:
    """A sampled answer and its reward."""

    prompt: list[int]
    ids: list[int]  # of the answer, with the end-of-turn token if it was reached
    drawn: list[int]  # 1 where the model sampled the id, 0 for tool output
    text: str
    reward: float


def seed_of(*numbers: int) -> int:
    """Hashes numbers such as step, question and answer into a seed, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def roll_out(
    answers: Answers, task: Task, example: Example, *, samples: int, sampling: Sampling, seed: int
) -> list[Rollout]:
    """Samples answers to one question, as many at once as the engine has slots, each with its own seed."""
    prompt = answers.chat.prompt(example.messages)
    requests = [(prompt, replace(sampling, seed=seed_of(seed, i))) for i in range(samples)]
    return [judged(answers, task, example, answer) for answer in answer_all(answers, requests)]


def judged(answers: Answers, task: Task, example: Example, answer: Answer) -> Rollout:
    """Returns the rollout of an answer, with reward 1 if it passes, else 0.

    Unlike in nanochat, the end-of-turn token is a target too: the model also chooses where to stop.
    """
    text = text_of(answers.chat.parse_answer(answer.ids))
    ended = [answers.chat.end_of_turn] if answer.finish_reason == "stop" else []
    ids, drawn = [*answer.ids, *ended], [*answer.drawn, *[1] * len(ended)]
    return Rollout(answer.prompt, ids, drawn, text, float(task.passes(example, text)))


# ---- the objective


def advantages_of(rewards: Tensor, *, sigma: bool = False) -> Tensor:
    """Returns rewards (n,) of one question's answers minus their mean; with `sigma`, over their standard deviation."""
    centred = rewards - rewards.mean()
    if not sigma:
        return centred
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > SMALLEST_SIGMA else torch.zeros_like(centred)


def batch_of(rollouts: Sequence[Rollout], padding: int, *, sigma: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens and targets (B, T) int64 and advantages (B,) fp32 of all answers to one question.

    Targets are -1 (IGNORED) in the prompt, in tool output, and in the padding after an answer.
    """
    longest = max(len(r.prompt) + len(r.ids) for r in rollouts)
    tokens = torch.full((len(rollouts), longest), padding)
    targets = torch.full((len(rollouts), longest), IGNORED)
    for row, target, rollout in zip(tokens, targets, rollouts, strict=True):
        start, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.ids)
        ids = torch.tensor(rollout.ids, dtype=torch.int64)
        row[:end] = torch.tensor([*rollout.prompt, *rollout.ids])
        target[start:end] = torch.where(torch.tensor(rollout.drawn, dtype=torch.bool), ids, IGNORED)
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    return tokens[:, :-1].contiguous(), targets[:, 1:].contiguous(), advantages_of(rewards, sigma=sigma)


def nll(model: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """Returns -log p (B, T) fp32 of each target, 0 where it is IGNORED; `model` is a GPT or a wrapped one."""
    return model(tokens, targets, reduction="none").view(targets.shape)


def objective(
    nlls: Tensor, targets: Tensor, advantages: Tensor, *, old: Tensor | None = None, clip: float = 0.0,
    reference: Tensor | None = None, kl: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the summed loss () and the number of targets (); their quotient is the loss.

    nlls, targets (B, T); advantages (B,). `old`: -log p (B, T) under the sampling policy, for the ratio that is clipped
    to 1 - clip ... 1 + clip; `reference`: -log q (B, T) under the reference model of the `kl` penalty.
    """
    valid = targets != IGNORED
    weight = advantages[:, None]
    if old is None:
        losses = nlls * weight
    else:
        ratio = (old - nlls).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip) if clip > 0 else ratio
        losses = -torch.minimum(ratio * weight, clipped * weight)
    if reference is not None and kl > 0:
        away = nlls - reference  # log q - log p
        losses = losses + kl * (away.exp() - away - 1)
    return (losses * valid).sum(), valid.sum()


def pass_at_k(passed: Sequence[Sequence[bool]], k: int) -> float:
    """Estimates the chance that at least one of k answers passes, averaged over questions, from n >= k answers each.

    Unbiased: 1 - C(n - c, k) / C(n, k) with c of n passing (Chen et al., arXiv:2107.03374).
    """
    shares = []
    for answers in passed:
        n, c = len(answers), sum(answers)
        if not 1 <= k <= n:
            raise ValueError(f"k: expected 1 to {n}, the number of answers, got {k}")
        shares.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return sum(shares) / len(shares)
