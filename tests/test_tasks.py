"""Tasks: prompts to the byte, answers judged, rows found, and scores of models whose answers are known."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from gptfast import checkpoint, cli, hf
from gptfast.chat.conversation import Chat, check, text_of
from gptfast.chat.sandbox import why_not
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer
from train import evaluate, score
from train.score import Score, Settings, mean_centred, measure
from train.tasks import TASKS, Example, Identity, Task, Where, find, gsm8k, humaneval, judged
from train.tasks.arc import make as make_arc
from train.tasks.identity import answers as identity_answers
from train.tasks.mmlu import make as make_mmlu
from train.tasks.task import asked
from train.tokenizer import train_bpe

SHARED = Path(__file__).parents[2] / "shared" / "data"
OFFLINE = ("spellingbee", "simplespelling", "identity", "arithmetic", "addition")
TEXT = (
    "What is 3 + 4? It is 7. I am Nano. Spell the word: apple. apple:a,p,p,l,e Hi! Who made you? 0123456789 ABCD " * 6
)

GSM8K_ROWS = [
    {"question": "Ten pens at $3.50?", "answer": "10*3.5=<<10*3.5=35.0>>35.0\n#### 35"},
    {"question": "A loss?", "answer": "3-5 = <<3-5=-2>>-2\n#### -2"},
    {"question": "Many?", "answer": "It is 1,000*2=<<1000*2=2000>>2,000.\n#### 2,000"},
    {"question": "Half?", "answer": "1/2=<<1/2=0.5>>0.5\n#### 0.5"},
]
HUMANEVAL_ROW = {
    "prompt": "import math\nfrom typing import List\n\n\ndef area(r: float) -> float:\n    '''Of a circle.'''\n",
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
}


# ---- prompts and rows


def test_multiple_choice_is_nanochats_to_the_byte() -> None:
    row = {
        "question": "What is H2O?",
        "choices": ["fire", "water", "air", "earth"],
        "answer": 1,
        "subject": "chemistry",
    }
    mmlu = make_mmlu({"train": row})
    assert mmlu.question == (
        "Multiple Choice question: What is H2O?\n- fire=A\n- water=B\n- air=C\n- earth=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert mmlu.answer == "B" and mmlu == make_mmlu(row)
    arc = make_arc({"question": "Q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"})
    assert arc.question.startswith("Multiple Choice question: Q\n- x=1\n- y=2\n- z=3\n\nRespond") and arc.answer == "3"


def test_gsm8k_solutions_become_calls() -> None:
    parts = gsm8k.parts("A 3*4=<<3*4=12>>12 b.\n#### 12")
    assert parts == [
        {"type": "text", "text": "A 3*4="},
        {"type": "python", "text": "3*4"},
        {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12 b.\n#### 12"},
    ]
    assert gsm8k.parts("<<7>>")[1:3] == [{"type": "python", "text": "7"}, {"type": "python_output", "text": ""}]


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (GSM8K_ROWS[0], "so\n#### 35", "#### 36"), (GSM8K_ROWS[1], "#### -2", "#### 2"),
        (GSM8K_ROWS[2], "#### 2000", "#### 200"), (GSM8K_ROWS[2], "#### 2,000", "2,000"),
        (GSM8K_ROWS[3], "#### 0.5 in all", "#### 0"),
    ],
)  # fmt: skip
def test_gsm8k_answers(row: dict[str, str], right: str, wrong: str) -> None:
    example = gsm8k.make(row)
    assert gsm8k.passes(example, right) and not gsm8k.passes(example, wrong) and not gsm8k.passes(example, "")
    assert gsm8k.passes(example, text_of(example.answer))


def test_all_of_gsm8k_passes_its_own_answers() -> None:
    if not SHARED.exists():
        pytest.skip(f"needs {SHARED}")
    for split, count in (("train", 7473), ("test", 1319)):
        examples = TASKS["gsm8k"].examples(split, Where(str(SHARED)))
        assert len(examples) == count
        for example in examples[::20]:
            check(example.messages)
            assert gsm8k.passes(example, text_of(example.answer))


def test_humaneval_runs_the_tests() -> None:
    if all(map(why_not, ("bubblewrap", "namespaces"))):
        pytest.skip(why_not("namespaces"))
    example = humaneval.make(HUMANEVAL_ROW)
    assert humaneval.passes(example, example.answer)
    assert humaneval.passes(example, f"Here:\n```python\n{example.answer}\n```\nDone.\n```python\n1/0\n```")
    assert humaneval.passes(example, "def area(r):\n    return math.pi * r ** 2")  # the prompt's imports are there
    assert not humaneval.passes(example, "def area(r):\n    return r")
    assert not humaneval.passes(example, "I cannot.")
    assert not humaneval.passes(example, "def area(r):\n    raise SystemExit(1)")


def test_humanevals_own_solutions_pass() -> None:
    if not SHARED.exists() or all(map(why_not, ("bubblewrap", "namespaces"))):
        pytest.skip(f"needs {SHARED} and a sandbox")
    examples = TASKS["humaneval"].examples("test", Where(str(SHARED)))
    assert len(examples) == 164
    for example in examples[::8]:
        assert humaneval.passes(example, example.answer), example.facts["entry_point"]
        assert not humaneval.passes(example, example.facts["prompt"] + "    return 'no'")


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("split", ["train", "test"])
def test_offline_tasks_are_conversations_that_pass(name: str, split: str) -> None:
    task = find(name)
    examples = task.examples(split, Where())
    again = task.examples(split, Where())
    for i in range(0, min(len(examples), 300), 7):
        example = examples[i]
        check(example.messages)
        assert task.passes(example, text_of(example.answer)) and not task.passes(example, "I do not know")
        assert again[i] == example


def test_counting_letters_counts_right() -> None:
    for example in TASKS["spellingbee"].examples("test", Where())[:200]:
        call, output, end = example.answer[1]["text"], example.answer[2]["text"], example.answer[3]["text"]
        word, letter = call.split("'")[1], call.split("'")[3]
        assert str(word.count(letter)) == output and f"#### {output}" in end and word in example.question


def test_identity_keeps_questions_for_test() -> None:
    who = Identity("Ada", "Grace", "12 million", "I forget")
    train, test = (TASKS["identity"].examples(split, Where(identity=who)) for split in ("train", "test"))
    assert not {e.question for e in train} & {e.question for e in test} and len(test) > 100
    said = {e.answer for e in [*train, *test]}
    assert said == {text for text, _ in identity_answers(who).values()} and "I am Ada." in said


def test_files_of_tasks(tmp_path: Path) -> None:
    where = Where(str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(UserError, match=r"one file test .*found none"):
        TASKS["gsm8k"].examples("test", where)
    lines = "\n".join(map(json.dumps, GSM8K_ROWS))
    (tmp_path / "gsm8k" / "test.jsonl").write_text(lines)
    with gzip.open(tmp_path / "gsm8k" / "train.jsonl.gz", "wt") as file:
        file.write(lines)
    for split in ("test", "train"):
        questions = [e.question for e in TASKS["gsm8k"].examples(split, where)]
        assert sorted(questions) == sorted(row["question"] for row in GSM8K_ROWS)
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        TASKS["gsm8k"].examples("test", where)
    packed = gzip.compress(b"")
    (tmp_path / "gsm8k" / "train.jsonl.gz").write_bytes(packed[:10] + b"\xff" + packed[11:])  # no block of deflate
    with pytest.raises(UserError, match=r"cannot read .*train\.jsonl\.gz \(it cannot be decompressed"):
        TASKS["gsm8k"].examples("train", where)
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(asked("a", "b")))
    assert list(find(f"jsonl:{path}").examples("train", where)) == [Example(asked("a", "b"))]


def test_rows_are_shuffled_as_datasets_does() -> None:
    datasets = pytest.importorskip("datasets")
    from train.tasks.task import Shuffled

    theirs = datasets.Dataset.from_dict({"i": list(range(50))}).shuffle(seed=42)["i"]
    assert list(Shuffled(list(range(50)))) == list(theirs)


def test_names_of_tasks() -> None:
    assert {task.name for task in judged("all")} == set(TASKS) - {"smoltalk"}
    assert [task.name for task in judged("mmlu, gsm8k")] == ["mmlu", "gsm8k"]
    with pytest.raises(UserError, match="unknown task gsm8; did you mean gsm8k"):
        judged("gsm8")
    with pytest.raises(UserError, match="smoltalk has conversations to learn from and no judge"):
        judged("smoltalk")


# ---- scores


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([TEXT], 300)


@pytest.fixture(scope="module")
def chat(tokenizer: BPETokenizer) -> Chat:
    return Chat(tokenizer)


class Rigged:
    """Knows the answer of every prompt; or gives every token the same logit and answers nothing."""

    def __init__(self, chat: Chat, known: Sequence[Example] = ()) -> None:
        self.chat = chat
        self.known = {tuple(chat.prompt(e.messages)): text_of(e.answer) for e in known}

    def logits(self, prompts: Sequence[list[int]]) -> Tensor:
        logits = torch.zeros(len(prompts), 400)
        for row, prompt in zip(logits, prompts, strict=True):
            if tuple(prompt) in self.known:
                row[self.chat.tokenizer.encode(self.known[tuple(prompt)])[0]] = 1.0
        return logits

    def answers(self, prompts: Sequence[list[int]], settings: Settings) -> list[list[str]]:
        return [["no idea"] * (settings.samples - 1) + [self.known.get(tuple(p), "")] for p in prompts]


def choices(count: int) -> list[Example]:
    rows = [{"question": f"Q{i}", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(count)]
    return [make_mmlu(row) for row in rows]


def test_a_model_that_knows_scores_100_and_one_that_guesses_25(chat: Chat) -> None:
    mmlu = choices(40)
    right, guess = (measure(Rigged(chat, known), TASKS["mmlu"], mmlu, Settings(batch_size=7)) for known in (mmlu, []))
    assert (right.accuracy, right.centred, right.error) == (1.0, 1.0, 0.0)
    assert (guess.accuracy, guess.centred) == (0.25, 0.0)
    assert guess.error == pytest.approx(math.sqrt(0.25 * 0.75 / 39))
    problems = [gsm8k.make(row) for row in GSM8K_ROWS]
    assert measure(Rigged(chat, problems), TASKS["gsm8k"], problems, Settings(samples=3)).accuracy == 1.0
    assert measure(Rigged(chat, problems[:1]), TASKS["gsm8k"], problems, Settings()).accuracy == 0.25


def test_chatcore_by_hand() -> None:
    passed = {"arc_easy": 50, "arc_challenge": 25, "mmlu": 40, "gsm8k": 10, "humaneval": 5}
    scores = [Score(name, count, 100, TASKS[name].chance) for name, count in passed.items()]
    assert mean_centred(scores[:4]) is None
    core = mean_centred(scores)
    assert core is not None and core[0] == pytest.approx((1 / 3 + 0 + 0.2 + 0.1 + 0.05) / 5)
    errors = [score.error / (1 - score.chance) for score in scores]
    assert core[1] == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 5)
    assert "| ChatCORE | | | 0.1367 ± " in score.table({"m": scores}) and "| gsm8k | 100 | 0 % | 10.0 %" in score.table(
        {"m": scores}
    )


def tiny(tokenizer: BPETokenizer) -> GPT:
    torch.manual_seed(1)
    config = GPTConfig(
        block_size=256, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, bias=False, norm="rmsnorm",
        norm_weight=True, position="rope", activation="swiglu", mlp_width=64, tied=False,
    )  # fmt: skip
    model = GPT(config, kernels.load("reference"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def test_transformers_answers_as_ours_does(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """The same letters and the same greedy texts, and so the same accuracy, whatever it is."""
    transformers = pytest.importorskip("transformers")
    model = tiny(tokenizer)
    hf.save(model, tmp_path, tokenizer, layout="llama")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert read.generation_config.eos_token_id == [tokenizer.bos, Chat(tokenizer).end_of_turn]
    theirs = score.Theirs(read, Chat(tokenizer))
    ours = score.Ours(model, Chat(tokenizer))
    mmlu = choices(24)
    assert measure(ours, TASKS["mmlu"], mmlu, Settings()) == measure(theirs, TASKS["mmlu"], mmlu, Settings())
    prompts = [ours.chat.prompt(e.messages) for e in mmlu[:3]]
    torch.testing.assert_close(ours.logits(prompts), theirs.logits(prompts), atol=1e-4, rtol=1e-4)
    settings = Settings(max_tokens=12)
    assert ours.answers(prompts, settings) == theirs.answers(prompts, settings)


def test_the_command_scores_models(tokenizer: BPETokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny(tokenizer), tmp_path / "out"
    meta: dict[str, Any] = {"model": vars(model.config), "tokenizer": tokenizer.to_json()}
    checkpoint.save(out, step=0, model=model.state_dict(), optimizer={}, meta=meta)
    arguments = [f"--models={out}", "--tasks=addition,arithmetic", "--max_examples=6", "--max_tokens=4", "--device=cpu"]
    assert cli.run(evaluate.main, [*arguments, f"--out_dir={tmp_path / 'report'}", "--dtype=float32"]) == 0
    said = capsys.readouterr().out
    assert "| addition | 6 | 0 % | " in said and "| arithmetic | 6 | 0 % | " in said
    rows = [json.loads(line) for line in (tmp_path / "report" / "tasks.jsonl").read_text().splitlines()]
    assert [(row["task"], row["examples"]) for row in rows] == [("addition", 6), ("arithmetic", 6)]
    assert cli.run(evaluate.main, [f"--models={out}", "--tasks=smoltalk", "--device=cpu"]) == 2


def test_tasks_without_a_judge_pass_nothing() -> None:
    assert not Task("x", "conversations", lambda split, where: []).passes(Example(asked("a", "b")), "b")
