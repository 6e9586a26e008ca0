"""Scores base models on CORE by the continuation that they find most likely; train/tasks/core.py makes the prompts.

    reader = Reader("gpt2", 1024, tokenizer, logits, identity)
    score = measure(reader, task, batch_size=8, journal=Journal(path))

Each choice is scored by the mean loss over its own tokens: in multiple choice the tokens after the common prefix, in
schemas the tokens of the common suffix. The lowest loss is the model's answer; on a tie, the first. A text longer than
the model's context loses its beginning. CORE is the mean over all tasks of the accuracy above chance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import untrusted
from gptfast.errors import UserError
from train.score import Encoder, Score
from train.tasks.core import CoreTask, prompts

PREFIX = "core:"  # of a CORE task's name: two chat tasks have the same names
FORM = 1  # version of the scoring; changing it invalidates every journal
SHORT = 4  # a batch of short sequences holds at most this many times batch_size
CHUNK = 8  # a chunk is this many times batch_size items, sorted by length together; one line of the journal

# tokens (B, T) int64, rows and columns (N,) int64 -> logits (N, V) for the token after tokens[rows, columns]
LogitsAt = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reader:
    """A model to score. `identity` describes everything that its scores depend on, the weights included."""

    name: str
    context: int  # the longest sequence
    tokenizer: Encoder
    logits: LogitsAt
    identity: str = ""


@dataclass(frozen=True)
class Sequel:
    """A token sequence; the tokens from `start` on are scored."""

    ids: list[int]
    start: int


@torch.no_grad()
def measure(reader: Reader, task: CoreTask, batch_size: int, journal: Journal) -> Score:
    """Returns the score over all items, skipping the chunks that `journal` already holds. Shows progress."""
    from tqdm import tqdm

    key = _key(reader, task, batch_size)
    step, total, passed = CHUNK * batch_size, len(task.items), 0
    with tqdm(total=total, desc=f"{reader.name}: {task.name}", disable=None) as progress:
        for first in range(0, total, step):
            right = journal.read(key, first)
            if right is None:
                right = judge(reader, task, range(first, min(first + step, total)), batch_size)
                journal.write(key, first, right, reader.name, task.name)
            passed += sum(right)
            progress.update(len(right))
    return Score(PREFIX + task.name, passed, total, task.chance)


def _key(reader: Reader, task: CoreTask, batch_size: int) -> str:
    """Returns a key of everything that a chunk's result depends on."""
    facts = [
        FORM, reader.name, reader.context, reader.identity, task.name, task.kind, task.shown,
        task.delimiter, len(task.items), task.sha256, batch_size,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def judge(reader: Reader, task: CoreTask, indices: Sequence[int], batch_size: int) -> list[bool]:
    """Returns whether the model answers each of these items correctly."""
    sequels = [sequels_of(task, index, reader.tokenizer, reader.context) for index in indices]
    flat = [sequel for of_item in sequels for sequel in of_item]
    likely: dict[int, tuple[float, bool]] = {}
    for batch in batches([len(sequel.ids) for sequel in flat], batch_size, reader.context):
        likely |= zip(batch, read(reader, [flat[i] for i in batch]), strict=True)
    right, first = [], 0
    for index, of_item in zip(indices, sequels, strict=True):
        nats, hits = zip(*(likely[first + i] for i in range(len(of_item))), strict=True)
        first += len(of_item)
        if task.kind == "language_modeling":
            right.append(hits[0])
        else:
            right.append(nats.index(min(nats)) == task.items[index]["gold"])
    return right


def batches(lengths: Sequence[int], batch_size: int, context: int) -> Iterator[list[int]]:
    """Yields batches of indices into `lengths`, each with at most `batch_size * context` tokens, padding included.

    The longest come first, so that a lack of memory shows at once. A batch holds at most SHORT * `batch_size`
    sequences, because each scored token takes a row of logits.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first = 0
    while first < len(order):
        count = min(SHORT * batch_size, max(1, batch_size * context // lengths[order[first]]))
        yield order[first : first + count]
        first += count


def read(reader: Reader, batch: Sequence[Sequel]) -> list[tuple[float, bool]]:
    """Returns for each sequel the mean loss in nats of its scored tokens, and whether each was the most likely."""
    longest = max(len(sequel.ids) for sequel in batch)
    padding = batch[0].ids[0]  # after the end, where no scored token sees it
    tokens = torch.tensor([[*sequel.ids, *[padding] * (longest - len(sequel.ids))] for sequel in batch])
    counts = torch.tensor([len(sequel.ids) - sequel.start for sequel in batch])
    rows = torch.repeat_interleave(torch.arange(len(batch)), counts)
    columns = torch.cat([torch.arange(sequel.start - 1, len(sequel.ids) - 1) for sequel in batch])
    wanted = tokens[rows, columns + 1]
    logits = reader.logits(tokens, rows, columns).float()
    nats = F.cross_entropy(logits, wanted.to(logits.device), reduction="none").double().cpu()
    missed = logits.argmax(-1).cpu() != wanted
    # fp64 sums of fp32 are exact, so a model with a uniform output gives equal means whatever the lengths.
    zero = torch.zeros(len(batch), dtype=torch.float64)
    means = zero.index_add(0, rows, nats) / counts
    misses = zero.index_add(0, rows, missed.double())
    return list(zip(means.tolist(), (misses == 0).tolist(), strict=True))


# ---- tokens


def sequels_of(task: CoreTask, index: int, tokenizer: Encoder, context: int) -> list[Sequel]:
    """Returns the sequences of item `index`, one for each choice or beginning, each of at most `context` tokens."""
    texts = prompts(task, index)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = [begin + tokenizer.encode(text) for text in texts]
    if task.kind == "schema":
        ending = _common([sequence[::-1] for sequence in ids])
        starts = [len(sequence) - ending for sequence in ids]
    else:
        starts = [_common(ids)] * len(ids)
    if task.kind == "language_modeling":
        ids, starts = ids[1:], starts[1:]
    return [_cut(task, sequence, start, context) for sequence, start in zip(ids, starts, strict=True)]


def _cut(task: CoreTask, ids: list[int], start: int, context: int) -> Sequel:
    """Keeps the last `context` tokens; scores at least the last one, and never the first, which has no predecessor.

    A choice that is a prefix of another has no token of its own; nanochat takes the mean of an empty slice there.
    """
    cut = max(0, len(ids) - context)
    if len(ids) - cut < 2:
        raise UserError(f"{task.name}: a text of {len(ids)} token in a context of {context} leaves nothing to foresee")
    return Sequel(ids[cut:], min(max(start - cut, 1), len(ids) - cut - 1))


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest common prefix."""
    for i, tokens in enumerate(zip(*sequences, strict=False)):
        if any(token != tokens[0] for token in tokens):
            return i
    return min(map(len, sequences))


# ---- going on


class Journal:
    """The results so far, one line per chunk, so that an interrupted run can continue; nothing without a path."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[tuple[str, int], str] = {}
        if path is None or not path.is_file():
            return
        try:
            for line in untrusted.rows(path, untrusted.Allowance()):
                with contextlib.suppress(*untrusted.STRANGE):  # the last line may be truncated
                    row = untrusted.parsed(line)
                    key, first, right = row["key"], row["first"], row["right"]
                    if isinstance(key, str) and isinstance(first, int) and set(right) <= {"0", "1"}:
                        self._known[key, first] = "".join(right)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {path} ({untrusted.reason(error)}); remove it, or choose another --out_dir"
            ) from None

    def read(self, key: str, first: int) -> list[bool] | None:
        right = self._known.get((key, first))
        return None if right is None else [mark == "1" for mark in right]

    def write(self, key: str, first: int, right: Sequence[bool], model: str, task: str) -> None:
        if self.path is None:
            return
        marks = "".join("1" if r else "0" for r in right)
        row = {"model": model, "task": task, "key": key, "first": first, "right": marks}
        try:
            with self.path.open("ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a truncated line must not spoil this one
                        file.write(b"\n")
                file.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); choose another --out_dir") from None
