"""Mixtures and rows: the stated shares, every conversation once, the same again after a stop, a loss of something."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from gptfast.chat.conversation import Chat
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.model import GPT, IGNORED
from train.mixture import ConversationBatches, Mixture, Part, read_mixture
from train.schedules import rl_multiplier, sft_momentum, sft_multiplier
from train.tasks import Example, Where
from train.tasks.task import asked
from train.tokenizer import train_bpe


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_bpe(["the answer number of question is here word " * 20 + "0123456789"], 280))


def part(name: str, count: int, repeats: float = 1.0, length: int = 1) -> Part:
    texts = [(f"question {name} {i}", f"answer {name}{i}" + " word" * (length * i % 23)) for i in range(count)]
    return Part(name, [Example(asked(*text)) for text in texts], repeats)


def learnt(batches: Any, rows: int, chat: Chat) -> Counter[str]:
    """The answers in the targets of so many rows: every run of targets is one, or a piece of one."""
    found: Counter[str] = Counter()
    for x, y, _ in islice(batches, rows // batches.batch_size):
        for tokens, targets in zip(x.tolist(), y.tolist(), strict=True):
            assert tokens[0] == chat.bos
            run: list[int] = []
            for target in [*targets, IGNORED]:
                if target != IGNORED:
                    run.append(target)
                elif run:
                    found[chat.tokenizer.decode([i for i in run if i != chat.end_of_turn])] += 1
                    run = []
    return found


def answers_of(mixture: Mixture, epoch: int) -> Counter[str]:
    return Counter(mixture.example(*map(int, place)).answer for place in mixture.order(epoch))


def test_an_epoch_has_the_stated_shares() -> None:
    mixture = Mixture([part("a", 30, 2.0), part("b", 10, 1.0), part("c", 10, 0.5), part("d", 4, 1.25)], seed=3)
    assert len(mixture) == 60 + 10 + 5 + 5
    for epoch in range(4):
        counts = Counter(int(which) for which, _ in mixture.order(epoch))
        assert counts == {0: 60, 1: 10, 2: 5, 3: 5}
        assert set(Counter(int(i) for which, i in mixture.order(epoch) if which == 0).values()) == {2}
    halves = Counter(int(i) for epoch in (0, 1) for which, i in mixture.order(epoch) if which == 2)
    assert halves == dict.fromkeys(range(10), 1)  # what one epoch leaves out is the next one's


def test_the_order_is_that_of_the_seed() -> None:
    parts = [part("a", 30), part("b", 30)]
    first = Mixture(parts, seed=1).order(5)
    assert (first == Mixture(parts, seed=1).order(5)).all()
    assert (first != Mixture(parts, seed=2).order(5)).any() and (first != Mixture(parts, seed=1).order(6)).any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_conversation_is_learnt_once_per_epoch_over_all_ranks(chat: Chat, ranks: int) -> None:
    mixture = Mixture([part("a", 150, length=3), part("b", 40, length=5)], seed=1)
    alone = ConversationBatches(mixture, chat, 2, 127)
    rows = 0
    while alone.epoch < 2:
        next(alone)
        rows += 2
    alone.close()
    rows = -(-rows // (2 * ranks)) * 2 * ranks
    total: Counter[str] = Counter()
    for rank in range(ranks):
        loader = ConversationBatches(mixture, chat, 2, 127, rank=rank, ranks=ranks)
        total += learnt(loader, rows // ranks, chat)
        loader.close()
    two = answers_of(mixture, 0) + answers_of(mixture, 1)
    assert total >= two and total - two <= answers_of(mixture, 2)


def test_rows_are_those_of_the_conversations(chat: Chat) -> None:
    """Ids and targets of a row are the renderings one after the other, then padding that teaches nothing."""
    mixture = Mixture([part("a", 12, length=3)], seed=2)
    loader = ConversationBatches(mixture, chat, 4, 200)
    x, y, cu_seqlens = next(loader)
    loader.close()
    rendered = [chat.render(example.messages) for example in mixture.parts[0].examples]
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        starts = [i for i, token in enumerate(row) if token == chat.bos] + [len(row)]
        for first, last in pairwise(starts):
            piece = row[first:last]
            if piece == [chat.bos]:
                assert targets[first] == IGNORED
                continue
            ids, mask = next((ids, mask) for ids, mask in rendered if ids[: len(piece)] == piece)
            wanted = [i if m else IGNORED for i, m in zip(ids[1:], mask[1:], strict=True)]
            assert targets[first : first + len(wanted)] == wanted
    padded = torch.cat((torch.zeros(4, 1, dtype=torch.bool), (x[:, 1:] == chat.bos) & (x[:, :-1] == chat.bos)), dim=1)
    starts = (x == chat.bos) & ~padded  # padding is one document
    assert cu_seqlens.tolist() == [*starts.flatten().nonzero().flatten().tolist(), x.numel()]


def test_best_fit_wastes_little(chat: Chat) -> None:
    mixture = Mixture([part("a", 400, length=1)], seed=0)
    loader = ConversationBatches(mixture, chat, 8, 255)
    x = torch.cat([next(loader).x for _ in range(4)])
    loader.close()
    padding = (x[:, 1:] == chat.bos) & (x[:, :-1] == chat.bos)
    assert padding.float().mean() < 0.05


def test_short_conversations_do_not_wait_for_gaps(chat: Chat) -> None:
    """Half are short: early in the epoch many rows begin with one already, and it has nothing before it."""
    long = Part("long", [Example(asked(f"question {i}", "word " * 40)) for i in range(600)])
    short = Part("short", [Example(asked(f"question {i}", "a")) for i in range(600)])
    loader = ConversationBatches(Mixture([long, short], seed=4), chat, 100, 200)
    starts = next(loader).y.tolist()
    loader.close()
    first_answers = [row[next(i for i, t in enumerate(row) if t != IGNORED) :] for row in starts]
    begin_short = sum(row[2] == IGNORED for row in first_answers)  # "a" and the end of the turn
    assert begin_short >= 25  # none, where the longest of all begins every row


@pytest.mark.parametrize("long", ["split", "drop"])
def test_long_conversations_are_split_or_dropped_and_counted(chat: Chat, long: Any) -> None:
    examples = [Example(asked("q", "word " * 90)), Example(asked("q", "short")), Example(asked("word " * 200, "end"))]
    mixture = Mixture([Part("x", examples)], seed=0)
    loader = ConversationBatches(mixture, chat, 1, 64, long=long)
    targets: list[int] = []
    while loader.counts["taken"] < len(examples) or loader.state_dict()["buffer"]:
        targets += [t for t in next(loader).y.flatten().tolist() if t != IGNORED]
    loader.close()
    kept = examples if long == "split" else examples[1:2]
    wanted = [i for e in kept for i, m in zip(*chat.render(e.messages), strict=True) if m]
    assert Counter(targets) == Counter(wanted)
    counts = loader.counts
    assert (counts["taken"], counts["split"], counts["dropped"]) == ((3, 2, 0) if long == "split" else (3, 0, 2))


def test_what_teaches_nothing_is_left_out(chat: Chat) -> None:
    silent = Example([{"role": "user", "content": "hello?"}])
    loader = ConversationBatches(Mixture([Part("x", [silent, Example(asked("a", "b"))])]), chat, 1, 32)
    assert (next(loader).y != IGNORED).any() and loader.counts["unlearnt"] >= 1
    loader.close()
    nothing = ConversationBatches(Mixture([Part("x", [silent])]), chat, 1, 32)
    with pytest.raises(UserError, match="nothing to learn in 1 conversations"):
        next(nothing)
    too_long = ConversationBatches(Mixture([Part("x", [Example(asked("a", "b " * 99))])]), chat, 1, 32, long="drop")
    with pytest.raises(UserError, match="--long=split"):
        next(too_long)


@pytest.mark.parametrize("taken", [1, 7, 40])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_goes_on_exactly(chat: Chat, taken: int, ranks: int) -> None:
    mixture = Mixture([part("a", 60, 1.5, length=3), part("b", 20, length=9)], seed=5)
    loader = ConversationBatches(mixture, chat, 2, 64)
    for _ in range(taken * ranks):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(loader) for _ in range(6)]
    loader.close()
    for rank in range(ranks):
        again = ConversationBatches(mixture, chat, 2, 64, rank=rank, ranks=ranks)
        again.load_state_dict(state)
        for i in range(rank, 6, ranks):
            found = next(again)
            assert all(map(torch.equal, found, expected[i]))
        again.close()
    other = ConversationBatches(Mixture(mixture.parts, seed=6), chat, 2, 64)
    with pytest.raises(UserError, match="seed=5, not 6"):
        other.load_state_dict(state)
    other.close()


def test_the_loss_of_long_conversations_in_a_short_context_is_finite(chat: Chat) -> None:
    """200 batches of which most are pieces of conversations ten times as long as a row."""
    examples = [Example(asked("number " * 70, "word " * (5 + 60 * (i % 3)))) for i in range(20)]
    loader = ConversationBatches(Mixture([Part("x", examples)]), chat, 1, 64)
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=64, vocab_size=280, n_layer=1, n_head=1, n_embd=16, position="rope"),
        kernels.load("reference"),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for x, y, _ in islice(loader, 200):
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loader.close()
    assert all(map(torch.isfinite, torch.tensor(losses))) and sum(losses[-20:]) < sum(losses[:20])


def test_mixtures_are_read_from_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(asked("a", "b")) + "\n")
    mixture = read_mixture(f"identity*2, addition ,jsonl:{path}*0.5", Where(), seed=1)
    named = [(p.name, p.repeats) for p in mixture.parts]
    assert named == [
        ("identity", 2.0),
        ("addition", 1.0),
        (f"jsonl:{path}", 0.5),
    ]
    assert "addition: 300 conversations x 1" in mixture.describe()
    for wrong, reason in (("", "needs a part"), ("addition*x", "NAME\\*REPEATS"), ("addition*0", "above 0"),
                          ("nothing", "unknown task")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            read_mixture(wrong, Where(), seed=1)


def test_schedules_by_hand() -> None:
    assert [sft_multiplier(p) for p in (0.0, 0.5, 0.75, 1.0, 1.3)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert sft_multiplier(0.05, warmup=0.1) == pytest.approx(0.5) and sft_multiplier(1.0, final=0.1) == 0.1
    assert [sft_momentum(i) for i in (0, 150, 300, 900)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [rl_multiplier(i, 10) for i in (0, 5, 10, 11)] == [1.0, 0.5, 0.0, 0.0]
