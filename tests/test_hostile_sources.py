"""Every other file that a command reads, made by somebody who wishes harm: texts, tasks, conversations, other formats.

`SOURCES` has a loader and a good file of each kind; tests/test_hostile.py has those of models and data sets. The long
form is `make chaos`.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from bench import deep
from gptfast import checkpoint, data, hf, untrusted
from gptfast.chat.conversation import SPECIAL_TOKENS, Chat
from gptfast.chat.session import Session
from gptfast.chat.terminal import _check_history
from gptfast.config import PRESETS, GPTConfig, nanochat
from gptfast.data import header, inspect, load_tokens
from gptfast.errors import UserError
from gptfast.hf import nanochat as nanochat_files
from gptfast.model import GPT
from gptfast.packing import PackedBatches
from gptfast.serve.__main__ import Serve, guarded_by
from tests.hostile import VALUES, Loader, attacks, signed
from tests.test_hf_nanogpt import saved
from tests.test_hostile import BYTES, OPS, TALK
from train import conversations, core, evaluate, rl, sft
from train.documents import Documents, Shape, make_shards
from train.files import _unpacked
from train.guard import Guard
from train.mixture import ConversationBatches, Mixture, Part
from train.policy import Rollout
from train.tasks import TASKS, Example, Where
from train.tasks import core as core_task
from train.tasks.task import asked
from train.tasks.words import words

CHAT = Chat(
    type(BYTES).from_ranks(
        {bytes([i]): i for i in range(256)}, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    )
)
BUNDLE = Path(__file__).parent / "core_bundle"
SFT = ("--mixture=identity,addition*0.5", "--isolate=False", "--eval_interval=6", "--batch_size=2", "--log_interval=1")
RL = ("--task=addition", "--examples_per_step=2", "--samples=3", "--batch_size=2", "--max_new_tokens=4",
      "--eval_interval=2", "--eval_examples=3", "--eval_samples=2")  # fmt: skip
ROWS = {
    "arc_easy": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "mmlu": {"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "law"},
    "humaneval": {"prompt": "import re\ndef f():", "entry_point": "f", "test": "def check(f): f()",
                  "canonical_solution": " pass"},
    "smoltalk": {"messages": TALK},
}  # fmt: skip
REPORT = (
    '"ID","Process ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum"\n'
    '"","","","","","usecond","Mbyte"\n"0","7","x","(128, 1, 1)","(4096, 1, 1)","20.00","50.0"\n'
)
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def packed(content: str, ending: str) -> bytes:
    return PACKERS[ending](content.encode()) if ending in PACKERS else content.encode()


def make_packed(folder: Path) -> None:
    """Documents in every form that train.prepare and train.tokenizer read, a folder each."""
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9))
    array = json.dumps([{"text": f"line {i}"} for i in range(9)])
    forms = [("jsonl", lines, ending) for ending in ("", *PACKERS)]
    forms += [("json", array, ""), ("txt", "words", ""), ("txt", "words", ".gz")]
    for number, (kind, content, ending) in enumerate(forms):
        (folder / str(number)).mkdir()
        (folder / str(number) / f"a.{kind}{ending}").write_bytes(packed(content, ending))
    parquet(folder / "parquet", [f"line {i}" for i in range(9)])


def parquet(folder: Path, texts: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")


def load_packed(folder: Path) -> None:
    for each in sorted(folder.iterdir()):
        documents = Documents.find(str(each))
        documents.count()
        for _ in documents.read():
            pass


def make_shards_of(folder: Path) -> None:
    """A data set in shards with a header, and one of llm.c's."""
    (folder.parent / "source.jsonl").write_text("".join(json.dumps({"text": f"words {i}"}) + "\n" for i in range(99)))
    make_shards(folder / "ours", Documents.find(str(folder.parent / "source.jsonl")), BYTES, Shape(0.1, 200))
    (folder / "llmc").mkdir()
    start = torch.zeros(256, dtype=torch.int32)
    start[:3] = torch.tensor([20240520, 1, 50])
    tokens = torch.arange(50, dtype=torch.int32).to(torch.uint16)
    (folder / "llmc" / "train.bin").write_bytes(start.numpy().tobytes() + tokens.numpy().tobytes())
    (folder / "bare.bin").write_bytes(header(3, 259, BYTES.fingerprint) + bytes(6))


def load_shards(folder: Path) -> None:
    for size in (data.IN_MEMORY_BYTES, 0):  # read whole, and mapped
        with mock.patch.object(data, "IN_MEMORY_BYTES", size):
            load_tokens(folder / "llmc" / "train.bin", 259, 8)
    for split in ("train", "val"):
        tokens = load_tokens(folder / "ours" / f"{split}.bin", BYTES.vocab_size, 4)
        batches = PackedBatches(tokens, 2, 4, bos=258)
        with contextlib.closing(batches):
            next(batches)
    inspect(folder / "bare.bin")


def make_tasks(folder: Path) -> None:
    for name, row in ROWS.items():
        (folder / name).mkdir()
        content = "".join(json.dumps(row) + "\n" for _ in range(3))
        ending = ".gz" if name == "mmlu" else ""
        (folder / name / f"test.jsonl{ending}").write_bytes(packed(content, ending))
    import pyarrow
    from pyarrow import parquet

    (folder / "gsm8k").mkdir()
    table = {"question": ["How many?"] * 3, "answer": ["2 + 3 = <<2+3=5>>5\n#### 5"] * 3}
    parquet.write_table(pyarrow.table(table), folder / "gsm8k" / "test.parquet")
    (folder / "words.txt").write_text("one two three")


def load_tasks(folder: Path) -> None:
    where = Where(str(folder))
    for name in (*ROWS, "gsm8k"):
        examples = TASKS[name].examples("test", where)
        for i in range(len(examples)):
            assert examples[i].messages
    words(where)


def make_bundle(folder: Path) -> None:
    shutil.copytree(BUNDLE, folder, dirs_exist_ok=True)


def load_bundle(folder: Path) -> None:
    for task in core_task.read(str(folder), "").values():
        for i in range(len(task.items)):
            core.sequels_of(task, i, BYTES, 600)


def make_nanochat(folder: Path) -> None:
    torch.manual_seed(0)
    config = nanochat(block_size=64, vocab_size=70, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
    nanochat_files.write(GPT(config, OPS), folder, step=7)


def load_nanochat(folder: Path) -> None:
    hf.load(folder, OPS).logits(torch.tensor([[1, 2]]))


def make_nanogpt(folder: Path) -> None:
    saved(folder)


def load_nanogpt(folder: Path) -> None:
    hf.load(folder, OPS).logits(torch.tensor([[1, 2]]))
    with contextlib.suppress(UserError):  # GPT-2's or none
        hf.load_tokenizer(folder)


def make_stranger(folder: Path) -> None:
    """A model and a tokenizer that only transformers can run."""
    import transformers

    from tests.test_evaluate_strangers import bloom_tokenizer

    bloom_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=280, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    (folder.parent / "text.txt").write_text("b, c (d)\n  x. It is (so) far" * 3)


def load_stranger(folder: Path) -> None:
    text = folder.parent / "text.txt"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate.main([f"--models={folder}", f"--text={text}", "--device=cpu", "--context=16"])


def make_talk(folder: Path) -> None:
    line = json.dumps({"messages": [{"role": "system", "content": "s"}, *TALK]})
    (folder / "talk.jsonl").write_text(f"{line}\n" * 3)


def load_talk(folder: Path) -> None:
    Session(SimpleNamespace(chat=object())).load(folder / "talk.jsonl")  # type: ignore[arg-type]
    with contextlib.redirect_stdout(io.StringIO()):
        conversations.prepare(str(folder / "talk.jsonl"), folder)


def make_small(folder: Path) -> None:
    """What is read besides: a token, a history, a report of Nsight Compute, a journal, a lock, half a download."""
    (folder / "token").write_text("0123456789abcdef0123456789abcdef")
    (folder / "history").write_text("\n# 2026-01-01\n+hello\n" * 9)
    (folder / "report.csv").write_text(REPORT)
    (folder / "journal").write_text(json.dumps({"key": "k", "first": 0, "right": "0110"}) + "\n")
    (folder / "nanogpt").mkdir()
    for name, content in (("train.bin", bytes(40)), ("val.bin", bytes(40)), ("meta.pkl", b"\x80\x04N.")):
        (folder / "nanogpt" / name).write_bytes(content)


def load_small(folder: Path) -> None:
    guarded_by(Serve(token_file=str(folder / "token")))
    with contextlib.suppress(OSError, ValueError):  # which the terminal turns into one line
        _check_history(str(folder / "history"))
    deep.read_report(folder / "report.csv")
    core.Journal(folder / "journal").read("k", 0)
    load_tokens(folder / "nanogpt" / "train.bin")


def base(folder: Path) -> Path:
    """A model that knows conversations and has learnt nothing, made once beside `folder`."""
    at = folder.parent / "base"
    if not at.exists():
        tokenizer = CHAT.tokenizer
        torch.manual_seed(0)
        sizes = dict(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=16)
        config = dataclasses.replace(PRESETS["modern"], **sizes)
        meta: dict[str, Any] = {"model": dataclasses.asdict(config), "tokenizer": tokenizer.to_json()}
        meta["config"] = {"batch_size": 2, "gradient_accumulation_steps": 1}
        checkpoint.save(at, step=0, model=GPT(config, OPS).state_dict(), optimizer={}, meta=meta)
    return at


def stage(command: Any, flags: tuple[str, ...]) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """What makes a checkpoint of this stage, and what goes on from it."""

    def run(folder: Path, steps: int, resume: str) -> None:
        given = [f"--init_from={base(folder)}", f"--out_dir={folder}", f"--max_iters={steps}", f"--resume={resume}"]
        common = ["--device=cpu", "--dtype=float32", "--compile=False", "--kernels=reference", "--eval_iters=1"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command.main([*flags, *common, *given])

    def make(folder: Path) -> None:
        run(folder, 1, "")
        (folder / "metrics.jsonl").unlink()

    return make, lambda folder: run(folder, 2, "latest")


SFT_STAGE, RL_STAGE = stage(sft, SFT), stage(rl, RL)
CORE_READERS = tuple(
    f"train/tasks/core.py:{name}" for name in ("_content", "_settings", "_chances", "_items", "Items.__getitem__")
)
SOURCES = [
    Loader(
        "packed", make_packed, load_packed,
        reads=("train/files.py:_of_text", "train/parquet.py:_opened", "train/parquet.py:_parquet"),
    ),
    Loader(
        "shards", make_shards_of, load_shards,
        reads=("gptfast/data.py:TokenFile.map", "gptfast/data.py:_sampled_largest"),
    ),
    Loader("tasks", make_tasks, load_tasks, reads=("train/tasks/words.py:words", "train/parquet.py:_opened")),
    Loader("core", make_bundle, load_bundle, reads=CORE_READERS),
    Loader(
        "nanochat", make_nanochat, load_nanochat,
        reads=(
            "gptfast/hf/nanochat.py:read", "gptfast/hf/torch_files.py:read", "gptfast/hf/torch_files.py:_check_archive",
        ),
    ),
    Loader("nanogpt", make_nanogpt, load_nanogpt, reads=("gptfast/hf/torch_files.py:read",)),
    Loader("talk", make_talk, load_talk),
    Loader(
        "small files", make_small, load_small, writes=True,
        reads=(
            "gptfast/serve/__main__.py:guarded_by", "bench/deep.py:read_report", "bench/deep.py:parse",
            "train/core.py:Journal.__init__",
        ),
    ),
]  # fmt: skip
SLOW = [
    Loader(
        "stranger", make_stranger, load_stranger,
        reads=(
            "train/evaluate.py:_from_pretrained", "train/evaluate.py:read_documents",
            "gptfast/tokenizer.py:_from_hugging_face",
        ),
    ),
    Loader(
        "sft checkpoint", SFT_STAGE[0], SFT_STAGE[1], signed, writes=True,
        reads=("train/mixture.py:ConversationBatches._restore", "train/guard.py:Guard.load_state_dict"),
    ),
    Loader(
        "rl checkpoint", RL_STAGE[0], RL_STAGE[1], signed, writes=True, reads=("train/rl.py:Drawing.load_state_dict",)
    ),
]  # fmt: skip


@pytest.mark.parametrize("loader", [*SOURCES, *SLOW], ids=lambda loader: loader.name)
def test_a_hostile_source_is_refused_in_one_line(
    loader: Loader, tmp_path: Path, chaos: Callable[[int, int], int]
) -> None:
    count = chaos(1 if loader in SLOW else 4, 200)
    verdicts = attacks(loader, tmp_path, count)
    assert sum(verdicts.values()) == count
    if count > 100:
        assert verdicts["refused"] >= count // 10
        print(f"{loader.name}: {verdicts}")


# ---- each kind by itself


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2"])
def test_what_is_packed_and_damaged_is_an_oserror_wherever_the_damage_is(ending: str, tmp_path: Path) -> None:
    """One bit in each byte, and cut before it: decompressors raise EOFError and errors of their own."""
    path = tmp_path / f"a.jsonl{ending}"
    lines = [b"%d\n" % (i**9) for i in range(1, 9)]
    good = packed(b"".join(lines).decode(), ending)
    damaged = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(len(good))]
    refused = 0
    for content in [good, *damaged, *(good[:i] for i in range(1, len(good)))]:
        path.write_bytes(content)
        for read in (lambda file: untrusted.whole(file, 999).splitlines(True), lambda file: [*untrusted.lines(file)]):
            try:
                with _unpacked(path) as file:
                    assert read(file) == lines
            except OSError:
                refused += 1
    assert refused > 3 * len(good)


def test_rows_of_a_task_that_are_packed_and_damaged_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mmlu" / "test.jsonl.gz"
    path.parent.mkdir()
    good = gzip.compress(json.dumps(ROWS["mmlu"]).encode())
    for content in (good[:-9], good[:12] + b"\xff" + good[13:], good[:-8] + bytes(8), b"\xff" + good):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^cannot read .*test\.jsonl\.gz \(.+\); bring it again$"):
            TASKS["mmlu"].examples("test", Where(str(tmp_path)))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "words"}]')[:-9])  # which no limit of arrays hides
    with pytest.raises(UserError, match=r"a\.json\.gz cannot be read \(.*decompressed"):
        list(Documents.find(str(tmp_path / "a.json.gz")).read())


def packed_batches() -> PackedBatches:
    return PackedBatches(torch.tensor([258, 1, 2, 258, 3, 4, 5] * 4), 1, 4, bos=258, prefetch=1)


def conversation_batches() -> ConversationBatches:
    examples = [Example(asked("a" * i, "b" * i)) for i in (1, 2, 60)]
    return ConversationBatches(Mixture([Part("x", examples)]), CHAT, 1, 16, prefetch=1)


def drawing(passes: int = 1) -> rl.Drawing:
    config = SimpleNamespace(
        kl=0.0, clip=0.2, task="x", seed=1, examples_per_step=1, samples=2, batch_size=2, passes=passes, sigma=False
    )
    answer = Rollout([CHAT.bos, 1], [2, 3], [1, 1], "", 1.0)
    asker = SimpleNamespace(config=config, draw=lambda *_: [[answer, answer]], chat=CHAT)
    sizes = dict(block_size=8, vocab_size=CHAT.tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    return rl.Drawing(asker, GPT(GPTConfig(**sizes), OPS), torch.device("cpu"))  # type: ignore[arg-type]


def changed(state: Any) -> Iterator[Any]:
    """The state with one of its values another, of each hostile kind."""
    yield from VALUES
    if isinstance(state, dict | list):
        for key, item in list(state.items() if isinstance(state, dict) else enumerate(state))[:6]:
            for other in changed(item):
                copy = state.copy()
                copy[key] = other
                yield copy


@pytest.mark.parametrize("make", [packed_batches, conversation_batches, drawing])
def test_a_position_in_the_data_that_is_damaged_is_refused_as_it_is_loaded(make: Callable[[], Any]) -> None:
    """And not by the thread that packs, many batches later, or by the model."""
    batches = make()
    batches._draw() if isinstance(batches, rl.Drawing) else next(batches)
    state = batches.state_dict()
    verdicts = {"refused": 0, "taken": 0}
    for damaged in changed(state):
        try:
            batches.load_state_dict(damaged)
        except untrusted.STRANGE:
            verdicts["refused"] += 1
            continue
        verdicts["taken"] += 1
        for _ in range(3):
            next(batches)
    assert verdicts["refused"] > 5 * verdicts["taken"] > 0
    batches.load_state_dict(state)
    next(batches)


def test_samples_of_another_vocabulary_or_shape_are_refused() -> None:
    batches = drawing()
    batches._draw()
    state = batches.state_dict()
    tokens, targets, advantages, old = state["drawn"][0]
    batches.load_state_dict(state)
    for damaged in (
        [tokens + CHAT.tokenizer.vocab_size, targets, advantages, old], [tokens, targets - 9, advantages, old],
        [tokens - 300, targets, advantages, old], [tokens.float(), targets, advantages, old],
        [tokens, targets[:1], advantages, old], [tokens, targets, advantages[:1], old],
        [tokens, targets, advantages * float("nan"), old], [tokens, targets, advantages], [tokens[:, :0]] * 4,
        [tokens.repeat(2, 1), targets.repeat(2, 1), advantages.repeat(2), old.repeat(2, 1)],
        [tokens.repeat(1, 9), targets.repeat(1, 9), advantages, old.repeat(1, 9)],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="it has answers"):
            batches.load_state_dict(state | {"drawn": [damaged]})


def test_what_a_guard_has_seen_is_counts_and_losses() -> None:
    guard = Guard(nonfinite="skip", spike=3.0)
    guard.record(2.5, 1.0, True, [])
    refused = 0
    for damaged in changed(guard.state_dict()):
        try:
            guard.load_state_dict(damaged)
        except untrusted.STRANGE:
            refused += 1
            continue
        guard.limit()
        guard.record(2.5, 1.0, True, [])
    assert refused > 100


def test_what_a_base_was_trained_with_is_of_the_kinds_of_settings(tmp_path: Path) -> None:
    at = base(tmp_path / "run")
    meta = checkpoint.load(at).meta
    config = sft.Sft(init_from=str(at))
    for key in ("learning_rate", "normalize_beta2", "rules", "cautious"):
        for value in ("a", [None], {"a": 1}):
            if isinstance(getattr(config, key), str) and isinstance(value, str):
                continue
            meta["config"] = {key: value}
            checkpoint.save(at, step=0, model=checkpoint.load(at).model, optimizer={}, meta=meta)
            with contextlib.redirect_stdout(io.StringIO()), pytest.raises(UserError, match=r"^[^\n]+$"):
                sft.inherit(config, {})
