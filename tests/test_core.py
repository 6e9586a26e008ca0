"""CORE: prompts to the byte, scores of models whose answers are known, transformers' own scores, and going on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from local_server import serve
from torch import Tensor

from gptfast import cli, hf
from gptfast.errors import UserError
from gptfast.hf import __main__ as hf_command
from gptfast.tokenizer import BPETokenizer, CharTokenizer
from gptfast.tokenizer_json import GPT2_PATTERN
from train import core, evaluate, score
from train.core import Journal, Reader, measure, sequels_of
from train.download import sha256_of
from train.tasks import core as asked

BUNDLE = Path(__file__).parent / "core_bundle"
BYTES = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {"<|bos|>": 256}, GPT2_PATTERN)
NAMES = ("colours", "who", "counting")


@pytest.fixture(scope="module")
def bundle() -> dict[str, asked.CoreTask]:
    return asked.read(str(BUNDLE), "")


# ---- prompts


def test_prompts_are_those_written_by_hand(bundle: dict[str, asked.CoreTask]) -> None:
    """The order is that of random.Random(1337), the examples those of random.Random(1234 + index)."""
    assert tuple(bundle) == NAMES
    before = "Question: What colour is blood?\nAnswer: red\n\nQuestion: What colour is coal?\nAnswer: black\n\n"
    assert asked.prompts(bundle["colours"], 1) == [
        f"{before}Question: What colour is the sky?\nAnswer: {choice}"
        for choice in ("blue", "green", "red", "a dark yellow")
    ]
    assert asked.prompts(bundle["who"], 2) == [
        "Ann thanked Mary because Mary had received help.", "Ann thanked Mary because Ann had received help.",
    ]  # fmt: skip
    # trimmed beginnings; the beginning alone ends before the space that belongs to the first token after it
    assert asked.prompts(bundle["counting"], 2) == [
        "Seven, eight, nine\n\nTen, eleven,", "Seven, eight, nine\n\nTen, eleven, twelve",
    ]  # fmt: skip
    assert [bundle[name].chance for name in NAMES] == [0.25, 0.5, 0.0]


def test_a_number_is_as_good_as_a_text() -> None:
    items = [{"context": 7, "continuation": 9}, {"context": "eight", "continuation": 1.5}]
    task = asked.CoreTask("sums", "language_modeling", 1, " is ", 0.0, items, "")
    assert asked.prompts(task, 0) == ["eight is 1.5\n\n7 is", "eight is 1.5\n\n7 is 9"]


def test_a_limit_cuts_before_examples_are_drawn() -> None:
    cut = asked.read(str(BUNDLE), "", max_examples=3)["colours"]
    kept = [item["query"] for item in cut.items]
    assert len(kept) == 3 and all(example["query"] in kept for i in range(3) for example in asked.shown(cut, i))
    with pytest.raises(UserError, match="colours shows 2 examples before each item and has 2 items"):
        asked.read(str(BUNDLE), "", max_examples=2)


def test_only_what_differs_is_judged(bundle: dict[str, asked.CoreTask]) -> None:
    def judged(name: str, context: int = 10_000) -> list[str]:
        sequels = sequels_of(bundle[name], 2, BYTES, context)
        assert all(sequel.ids[0] == 256 or len(sequel.ids) == context for sequel in sequels)
        return [BYTES.decode(sequel.ids[sequel.start :]) for sequel in sequels]

    assert judged("colours") == ["white", "blue-green", "red", "black"]
    assert judged("who") == [" had received help.", " had received help."]
    assert judged("counting") == [" twelve"]
    assert judged("colours", 8) == ["white", "ue-green"[-7:], "red", "black"]  # the first of a text is never foreseen
    with pytest.raises(UserError, match="leaves nothing to foresee"):
        judged("who", 1)


def test_a_choice_that_begins_another_is_judged_by_its_end() -> None:
    item = {"query": "A?", "choices": ["New York", "New York City"], "gold": 0}
    task = asked.CoreTask("place", "multiple_choice", 0, " ", 0.5, [item], "")
    short, long = sequels_of(task, 0, BYTES, 100)
    assert BYTES.decode(short.ids[short.start :]) == "k" and BYTES.decode(long.ids[long.start :]) == " City"


# ---- scores


class Knows:
    """Foresees the right texts, and nothing where it `knows` none: all tokens are alike to it then."""

    def __init__(self, tasks: Sequence[asked.CoreTask]) -> None:
        self.after: dict[tuple[int, ...], int] = {}
        self.calls = 0
        for task in tasks:
            for i, item in enumerate(task.items):
                ids = sequels_of(task, i, BYTES, 10_000)[item.get("gold", 0)].ids
                self.after |= {tuple(ids[:end]): ids[end] for end in range(1, len(ids))}

    def logits(self, tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        self.calls += 1
        logits = torch.zeros(len(rows), 257)
        for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
            known = self.after.get(tuple(tokens[row, : column + 1].tolist()))
            if known is not None:
                logits[i, known] = 5.0
        return logits


def scores_of(model: Knows, tasks: Sequence[asked.CoreTask], path: Path | None = None, batch_size: int = 3) -> Any:
    reader = Reader("rigged", 10_000, BYTES, model.logits)
    return [measure(reader, task, batch_size, Journal(path)) for task in tasks]


def test_a_model_that_knows_scores_1_and_one_that_guesses_0(bundle: dict[str, asked.CoreTask]) -> None:
    tasks = list(bundle.values())
    names = [core.PREFIX + name for name in NAMES]
    knows, guesses = scores_of(Knows(tasks), tasks), scores_of(Knows([]), tasks)
    assert score.mean_centred(knows, names) == (1.0, 0.0)
    assert [s.centred for s in guesses] == [0.0, 0.0, 0.0]
    mean = score.mean_centred(guesses, names)
    assert mean is not None and mean[0] == 0.0
    errors = [math.sqrt(0.25 * 0.75 / 3) / 0.75, math.sqrt(0.25 / 3) / 0.5, 0.0]
    assert mean[1] == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert score.mean_centred(knows[:2], names) is None
    assert "| CORE (3 tasks) | | | 1.0000 ± 0.0000 | 0.0000 ± " in score.table({"a": knows, "b": guesses}, names)


def test_centring_by_hand() -> None:
    scores = [
        score.Score("core:a", 40, 100, 0.25),
        score.Score("core:b", 62, 100, 0.62),
        score.Score("core:c", 7, 100, 0),
    ]
    mean = score.mean_centred(scores, ["core:a", "core:b", "core:c"])
    assert mean is not None and mean[0] == pytest.approx((0.2 + 0.0 + 0.07) / 3)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_does_not_matter(batch_size: int, bundle: dict[str, asked.CoreTask]) -> None:
    tasks = list(bundle.values())
    half = Knows([dataclasses.replace(task, items=task.items) for task in tasks[1:2]])
    assert scores_of(half, tasks, batch_size=batch_size) == scores_of(half, tasks)


def test_short_sequences_fill_a_batch_and_long_ones_do_not_overflow_it() -> None:
    lengths = [3, 100, 50, 10, 10, 100, 2, 1] + [1] * 20
    chosen = list(core.batches(lengths, 2, 100))
    assert sorted(i for batch in chosen for i in batch) == list(range(len(lengths)))
    assert chosen[:2] == [[1, 5], [2, 3, 4, 0]] and max(map(len, chosen)) == 4 * 2
    assert all(len(batch) * max(lengths[i] for i in batch) <= 2 * 100 for batch in chosen)
    assert list(core.batches([100, 100], 1, 64)) == [[0], [1]]


def gpt2(folder: Path) -> Path:
    """A GPT-2 of transformers with random weights, and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    from gptfast.hf import tokenizer_files

    torch.manual_seed(7)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=257, n_positions=96, bos_token_id=256, eos_token_id=256,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer_files.write(BYTES, folder)
    return folder


def test_a_folder_its_import_and_transformers_score_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: dict[str, asked.CoreTask]
) -> None:
    """In one table; and the mean nats of every choice are transformers' own. A text longer than 96 tokens is cut."""
    transformers = pytest.importorskip("transformers")
    folder, ours, out = gpt2(tmp_path / "theirs"), tmp_path / "ours", tmp_path / "out"
    hf_command.main(["import", str(folder), f"--out_dir={ours}"])
    flags = ["--tasks=core", f"--task_dir={BUNDLE}", "--device=cpu", "--dtype=float32", f"--out_dir={out}"]
    assert cli.run(evaluate.main, [f"--models={folder},{ours}", *flags]) == 0
    table = (out / "tasks.md").read_text()
    assert table in capsys.readouterr().out and f"| {folder} | {ours} |" in table
    rows = [json.loads(line) for line in (out / "tasks.jsonl").read_text().splitlines()]
    by_name = {name: [r for r in rows if r["name"] == str(name)] for name in (folder, ours)}
    for theirs, mine in zip(by_name[folder], by_name[ours], strict=True):
        same = ("task", "passed", "examples", "core", "core_error")
        assert [theirs.get(key) for key in same] == [mine.get(key) for key in same]
    assert [r.get("task") for r in by_name[ours]] == [*(core.PREFIX + name for name in NAMES), None]
    passed = [r["passed"] for r in by_name[ours][:3]]

    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    right = dict.fromkeys(NAMES, 0)
    for task in bundle.values():
        for i, item in enumerate(task.items):
            means = []
            for sequel in sequels_of(task, i, BYTES, 96):
                with torch.no_grad():
                    logits = model(torch.tensor([sequel.ids])).logits[0, sequel.start - 1 : -1]
                wanted = torch.tensor(sequel.ids[sequel.start :])
                means.append(torch.nn.functional.cross_entropy(logits, wanted).item())
                hit = bool((logits.argmax(-1) == wanted).all())
            said = hit if task.kind == "language_modeling" else means.index(min(means)) == item["gold"]
            right[task.name] += said
    assert passed == list(right.values())


def test_transformers_itself_reads_as_ours_does(tmp_path: Path, bundle: dict[str, asked.CoreTask]) -> None:
    """The logits through transformers, which models that ours cannot take are read by."""
    import kernels

    folder = gpt2(tmp_path)
    config = evaluate.Evaluate(models=str(folder))
    ours = evaluate.open_reader(str(folder), kernels.load("reference"), torch.float32, "cpu", config)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(hf, "why_not", lambda folder: "a test says so")
        theirs = evaluate.open_reader(str(folder), kernels.load("reference"), torch.float32, "cpu", config)
    assert ours.context == theirs.context == 96
    for task in bundle.values():
        for i in range(len(task.items)):
            sequels = sequels_of(task, i, BYTES, 96)
            mine, others = (core.read(reader, sequels) for reader in (ours, theirs))
            for (nats, hit), (nats_too, hit_too) in zip(mine, others, strict=True):
                assert nats == pytest.approx(nats_too, rel=1e-5) and hit == hit_too


# ---- going on


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, bundle: dict[str, asked.CoreTask]) -> None:
    tasks, path = list(bundle.values()), tmp_path / "core-progress.jsonl"
    whole = Knows(tasks[:1])
    expected = scores_of(whole, tasks, path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(tasks)  # one chunk each
    path.write_bytes(lines[0] + lines[1][:-9])  # killed while it wrote the second
    again = Knows(tasks[:1])
    assert scores_of(again, tasks, path) == expected and 0 < again.calls < whole.calls
    third = Knows(tasks[:1])
    assert scores_of(third, tasks, path) == expected and third.calls == 0
    other = Knows(tasks)
    reader = Reader("rigged", 10_000, BYTES, other.logits, identity="newer weights")
    assert measure(reader, tasks[1], 3, Journal(path)).accuracy == 1.0 and other.calls > 0
    assert scores_of(third, tasks, path) == expected and third.calls == 0
    scores_of(third, [dataclasses.replace(tasks[0], sha256="another file")], path)
    assert third.calls > 0


def test_weights_that_change_are_judged_anew(tmp_path: Path) -> None:
    (tmp_path / "ckpt-1").mkdir()
    (tmp_path / "ckpt-1" / "model.safetensors").write_bytes(b"1")
    before = evaluate._weights(tmp_path)
    (tmp_path / "tasks.jsonl").write_text("{}")  # what evaluation itself writes there
    assert evaluate._weights(tmp_path) == before and before
    (tmp_path / "ckpt-1" / "model.safetensors").write_bytes(b"2")
    assert evaluate._weights(tmp_path) != before
    for content in (b"a", b"ab"):  # nanoGPT's, in a folder or named itself
        before = evaluate._weights(tmp_path)
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert evaluate._weights(tmp_path) != before
    (alone,) = evaluate._weights(tmp_path / "ckpt.pt")
    assert alone[1] == 2


# ---- the bundle


def test_the_bundle_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(BUNDLE.rglob("*.*")):
            file.write(path, Path("eval_bundle") / path.relative_to(BUNDLE))
    with serve(archive.read_bytes()) as site:
        monkeypatch.setattr(asked, "URL", f"{site.url}/eval_bundle.zip")
        with pytest.raises(UserError, match=r"gave bytes of sha256 .*--task_dir=FOLDER"):
            asked.read("", str(tmp_path / "data"))
        monkeypatch.setattr(asked, "SHA256", sha256_of(archive))
        assert asked.read("", str(tmp_path / "data")) == asked.read(str(BUNDLE), "")
        fetched = len(site.asked)
        assert asked.read("", str(tmp_path / "data"))["who"].shown == 0 and len(site.asked) == fetched
    (tmp_path / "data" / "core" / "eval_bundle.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="is not the bundle of sha256"):
        asked.read("", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("core.yaml", "schema", "schemes", "icl_task_type schemes: known are multiple_choice"),
        ("core.yaml", "  dataset_uri: small/who.jsonl\n", "", "it lacks 'dataset_uri'"),
        ("core.yaml", "small/who.jsonl", "../../who.jsonl", "leads out of the bundle"),
        ("core.yaml", "small/who.jsonl", "small/whom.jsonl", "cannot read .*whom.jsonl"),
        ("core.yaml", "icl_tasks:", "icl_tasks: [", "bring the bundle again"),
        ("core.yaml", "num_fewshot: [1]", "num_fewshot: 1", "bring the bundle again"),
        ("eval_data/small/who.jsonl", "{", "[" * 100_000 + "{", "line 1: no item of schema .it is nested too deep"),
        ("eval_data/small/who.jsonl", '{"context_options"', '[], {"context_options"', "line 1: no item of schema"),
        ("eval_meta_data.csv", "who,", "whom,", "has no random baseline of who"),
        ("eval_meta_data.csv", ",50,", ",100,", "at least 0 and below 100"),
        ("eval_data/small/who.jsonl", '"gold": 1', '"gold": 2', "who.jsonl, line 2: no item of schema .gold cannot"),
        ("eval_data/small/counting.jsonl", '"continuation"', '"ending"', "line 1: no item .*no 'continuation'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_bundle_is_named(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    copy = tmp_path / "eval_bundle"
    shutil.copytree(BUNDLE, copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        asked.read(str(tmp_path), "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=core:colour"], "unknown task core:colour; did you mean colours?"),
        (["--tasks=core", "--task_dir={empty}"], "no core.yaml in it"),
        (["--tasks=core", "--max_examples=2"], "colours shows 2 examples"),
        (["--tasks=core", "--context=97"], "takes 96 tokens at most"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    folder = gpt2(tmp_path / "model") if "--context=97" in flags else tmp_path
    arguments = [f"--models={folder}", f"--task_dir={BUNDLE}", *flags, "--device=cpu"]
    assert cli.run(evaluate.main, [flag.format(empty=tmp_path / "empty") for flag in arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_tokenizer_without_a_beginning_reads_too(bundle: dict[str, asked.CoreTask]) -> None:
    letters = CharTokenizer(
        "".join(sorted({c for i in range(4) for text in asked.prompts(bundle["who"], i) for c in text}))
    )
    sequels = sequels_of(bundle["who"], 0, letters, 1000)
    assert [letters.decode(sequel.ids[sequel.start :]) for sequel in sequels] == [" is too small."] * 2
