"""Scores a model on tasks, by its most likely letter or by judging its answer, with standard errors.

    player = Ours(model, chat)                     # or Theirs, a model of transformers
    score = measure(player, find("gsm8k"), examples, Settings())
    print(table({"out": [score, ...]}))

In multiple choice the letter with the most likely token after the prompt is the answer. In other tasks the model writes
answers, with its tools, and solves a problem if any of `samples` answers passes. ChatCORE is the mean accuracy above
chance, (accuracy - chance) / (1 - chance), over its five tasks, where all were run. For base models see train/core.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast.chat.answers import Answers, answer_all
from gptfast.chat.conversation import PYTHON, Chat, text_of
from gptfast.chat.tools import Tools
from gptfast.engine import Engine, Sampling
from gptfast.errors import UserError
from gptfast.model import GPT
from train.tasks import CHATCORE, Example, Task


@dataclass(frozen=True)
class Settings:
    """How answers are sampled."""

    samples: int = 1  # answers to each problem; it is solved if one passes
    temperature: float = 0.0
    top_k: int = 50
    max_tokens: int = 512  # of an answer
    batch_size: int = 8
    seed: int = 42


class Encoder(Protocol):
    """The part of a tokenizer that scoring needs, ours or another's."""

    @property
    def bos(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Player(Protocol):
    """A model to score. `logits` returns (n, V) fp32: the next-token logits after each prompt."""

    chat: Chat

    def logits(self, prompts: Sequence[list[int]]) -> Tensor: ...
    def answers(self, prompts: Sequence[list[int]], settings: Settings) -> list[list[str]]: ...


@dataclass(frozen=True)
class Score:
    """The share of passed examples and its standard error, which is nan for a single example."""

    task: str
    passed: int
    count: int
    chance: float

    @property
    def accuracy(self) -> float:
        return self.passed / self.count

    @property
    def error(self) -> float:
        p, n = self.accuracy, self.count
        return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan

    @property
    def centred(self) -> float:
        """Returns the accuracy above chance: 0 for guessing, 1 if every example is passed."""
        return (self.accuracy - self.chance) / (1 - self.chance)


def measure(player: Player, task: Task, examples: Sequence[Example], settings: Settings) -> Score:
    """Returns the score over all `examples`. Shows progress."""
    from tqdm import tqdm

    if not len(examples):
        raise UserError(f"{task.name} has no examples; give more with --max_examples, or other data")
    passed = 0
    with tqdm(total=len(examples), desc=task.name, disable=None) as progress:
        for first in range(0, len(examples), settings.batch_size):
            batch = [examples[i] for i in range(first, min(first + settings.batch_size, len(examples)))]
            passed += sum(judge(player, task, batch, settings))
            progress.update(len(batch))
    return Score(task.name, passed, len(examples), task.chance)


def judge(player: Player, task: Task, batch: Sequence[Example], settings: Settings) -> list[bool]:
    """Returns whether the model passes each example."""
    prompts = [player.chat.prompt(example.messages) for example in batch]
    if task.kind == "categorical":
        logits = player.logits(prompts)
        answers = [[letter_of(player.chat, example, row)] for example, row in zip(batch, logits, strict=True)]
    else:
        answers = player.answers(prompts, settings)
    return [any(task.passes(example, text) for text in texts) for example, texts in zip(batch, answers, strict=True)]


def letter_of(chat: Chat, example: Example, logits: Tensor) -> str:
    """Returns the most likely of the example's letters by logits (V,)."""
    ids = [chat.tokenizer.encode(letter) for letter in example.letters]
    if any(len(token_ids) != 1 for token_ids in ids):
        raise UserError(f"the tokenizer needs more than one token for a letter of {', '.join(example.letters)}")
    return example.letters[int(logits[[token_ids[0] for token_ids in ids]].argmax())]


# ---- models


class Ours:
    """A GPT, which answers by the engine and with the calculator."""

    def __init__(self, model: GPT, chat: Chat, tools: Tools | None = None, slots: int = 8) -> None:
        self.model, self.chat, self.slots = model, chat, slots
        self.tools = Tools() if tools is None else tools
        self._answers: Answers | None = None

    @torch.no_grad()
    def logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Returns next-token logits (n, V); prompts longer than the model's context lose their beginning."""
        most, device = self.model.config.block_size, self.model.lm_head.weight.device
        tokens, last = _padded([prompt[-most:] for prompt in prompts], self.chat.bos)
        h = self.model.hidden(tokens.to(device))[torch.arange(len(tokens)), last]
        return h.float() @ self.model.lm_head.weight.float().T

    def answers(self, prompts: Sequence[list[int]], settings: Settings) -> list[list[str]]:
        if self._answers is None:
            tokenizer: Any = self.chat.tokenizer
            engine = Engine(self.model, slots=self.slots, tokenizer=tokenizer, weights="model")
            self._answers = Answers(engine, self.chat, self.tools)
        drawn = answer_all(
            self._answers,
            [
                (prompt, Sampling(settings.max_tokens, settings.temperature, settings.top_k, seed=settings.seed + i))
                for prompt in prompts
                for i in range(settings.samples)
            ],
        )
        texts = [text_of(self.chat.parse_answer(answer.ids)) for answer in drawn]
        return [texts[i : i + settings.samples] for i in range(0, len(texts), settings.samples)]


class Theirs:
    """A model of transformers whose tokenizer has the special tokens of conversations."""

    def __init__(self, model: Any, chat: Chat, tools: Tools | None = None) -> None:
        self.model, self.chat = model, chat
        self.tools = Tools() if tools is None else tools

    @torch.no_grad()
    def logits(self, prompts: Sequence[list[int]]) -> Tensor:
        tokens, last = _padded(prompts, self.chat.bos)
        return self.model(tokens.to(self.model.device)).logits[torch.arange(len(tokens)), last].float()

    def answers(self, prompts: Sequence[list[int]], settings: Settings) -> list[list[str]]:
        return [[self._answer(prompt, settings, i) for i in range(settings.samples)] for prompt in prompts]

    @torch.no_grad()
    def _answer(self, prompt: list[int], settings: Settings, number: int) -> str:
        """Returns one answer; pauses generation at the end of each tool call to run it."""
        torch.manual_seed(settings.seed + number)
        ids: list[int] = []
        first, last = (self.chat.ids[name] for name in PYTHON)
        drawing: dict[str, Any] = {"do_sample": False}
        if settings.temperature:
            drawing = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
        while len(ids) < settings.max_tokens:
            tokens = torch.tensor([prompt + ids], device=self.model.device)
            out = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=settings.max_tokens - len(ids),
                eos_token_id=[self.chat.end_of_turn, self.chat.bos, last], pad_token_id=self.chat.bos, **drawing,
            )[0, tokens.shape[1] :].tolist()  # fmt: skip
            if not out or out[-1] in (self.chat.end_of_turn, self.chat.bos):
                ids += out[:-1]
                break
            ids += out
            if out[-1] == last and first in ids:
                start = len(ids) - 1 - ids[::-1].index(first)
                output = self.tools.run(self.chat.tokenizer.decode(ids[start + 1 : -1]))
                ids += [] if output is None else self.chat.output(output)
        return text_of(self.chat.parse_answer(ids))


def _padded(prompts: Sequence[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Returns tokens (n, T) int64, padded on the right, and the index (n,) of each prompt's last token."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[padding] * (longest - len(prompt))] for prompt in prompts])
    return tokens, torch.tensor([len(prompt) - 1 for prompt in prompts])


# ---- the figures


def mean_centred(scores: Sequence[Score], names: Collection[str] = CHATCORE) -> tuple[float, float] | None:
    """Returns the mean accuracy above chance over the tasks `names`, with its standard error; None unless all were run.

    By default this is ChatCORE; with the names of CORE's tasks, CORE.
    """
    by_name = {score.task: score for score in scores}
    if not names or not set(names) <= by_name.keys():
        return None
    wanted = [by_name[name] for name in names]
    errors = [score.error / (1 - score.chance) for score in wanted]
    return statistics.fmean(score.centred for score in wanted), math.sqrt(sum(e * e for e in errors)) / len(errors)


def table(scores: Mapping[str, Sequence[Score]], core: Collection[str] = ()) -> str:
    """Returns accuracies in percent as Markdown, a row per task and a column per model; - where a task was not run.

    Below them ChatCORE, and CORE over the tasks `core`, each where all of its tasks were run.
    """
    tasks = list(dict.fromkeys(score.task for row in scores.values() for score in row))
    lines = [f"| task | examples | chance | {' | '.join(scores)} |", "|---|---:|---:|" + "---:|" * len(scores)]
    for name in tasks:
        row = [next((score for score in mine if score.task == name), None) for mine in scores.values()]
        first_score = next(score for score in row if score is not None)
        cells = ["-" if s is None else percent(s.accuracy, s.error) for s in row]
        lines.append(f"| {name} | {first_score.count:,} | {100 * first_score.chance:.0f} % | {' | '.join(cells)} |")
    for title, names in (("ChatCORE", CHATCORE), (f"CORE ({len(core)} tasks)", core)):
        means = [mean_centred(mine, names) for mine in scores.values()]
        if any(means):
            cells = ["-" if mean is None else f"{mean[0]:.4f} ± {mean[1]:.4f}" for mean in means]
            lines.append(f"| {title} | | | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} %" + (" ± n/a" if math.isnan(error) else f" ± {100 * error:.1f}")
