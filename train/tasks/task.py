"""The Task type: conversations to learn from and, where answers can be judged, a judge.

A task's examples are conversations whose last message is the right answer; multiple choice also lists its letters.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from gptfast import untrusted
from gptfast.errors import UserError, remedy, to_install

SHUFFLE_SEED = 42  # nanochat's, so that "the first 100 examples" are the same there and here
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Example:
    messages: list[dict[str, Any]]  # the last is the right answer
    letters: tuple[str, ...] = ()  # of multiple choice
    facts: dict[str, Any] = field(default_factory=dict)  # what the judge needs beside the answer

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    @property
    def answer(self) -> Any:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Identity:
    """The model's description of itself."""

    name: str = "Nano"
    maker: str = "the people of gptfast"
    size: str = "a few million"  # parameters
    limits: str = "I am small, so I make mistakes, and I know nothing of today's news"


@dataclass(frozen=True)
class Where:
    """The source of the tasks' data: `folder` holds a folder of files for each task; empty: the Hugging Face hub."""

    folder: str = ""
    identity: Identity = Identity()


@dataclass(frozen=True)
class Task:
    """`examples(split, where)` with split train or test; `passes(example, text)` judges what a model answered."""

    name: str
    kind: Literal["categorical", "generative", "conversations"]  # a letter, a judged text, or nothing to judge
    examples: Callable[[str, Where], Sequence[Example]]
    passes: Callable[[Example, str], bool] = lambda example, text: False
    chance: float = 0.0  # the score of guessing


class Mapped(Sequence[Example]):
    """Examples made from rows on access."""

    def __init__(self, rows: Sequence[Any], make: Callable[[Any], Example]) -> None:
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        with untrusted.expected(f"row {i} of the task's data", "bring its file again"):
            return self.make(self.rows[int(i) % len(self)])


class Shuffled(Sequence[Any]):
    """Rows in the order of `datasets`' shuffle with this seed."""

    def __init__(self, rows: Any, seed: int = SHUFFLE_SEED) -> None:
        self.rows, self.order = rows, np.random.default_rng(seed).permutation(len(rows))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: Any) -> Any:
        return self.rows[int(self.order[i])]


def rows(where: Where, name: str, split: str, repository: str, subset: str = "") -> Sequence[Any]:
    """Returns the shuffled rows of where.folder/<name>/<split>.jsonl, .jsonl.gz or .parquet, or else of the hub.

    A folder's only file need not be named after the split. Raises UserError, with what to do, if there are none.
    """
    if where.folder:
        return Shuffled(_read(_find(Path(where.folder) / name, split)))
    try:
        import datasets

        return Shuffled(datasets.load_dataset(repository, subset or None, split=split))
    except ImportError as error:
        fix = to_install(error, "datasets")
        raise UserError(f"{name} comes from the hub: {fix}, or give --task_dir") from None
    except Exception as error:  # the hub's client raises the errors of a dozen libraries
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise UserError(
            f"cannot get {repository} for {name} from the hub ({type(error).__name__}: {reason}); "
            f"give --task_dir=FOLDER with {name}/{split}.jsonl or .parquet in it"
        ) from None


def _find(folder: Path, split: str) -> Path:
    files = sorted(path for path in folder.glob("*") if path.name.endswith(SUFFIXES)) if folder.is_dir() else []
    named = [path for path in files if path.name.split(".")[0] == split or path.name.startswith(f"{split}-")]
    if len(named or files) != 1:
        found = f"{len(named or files)} of them" if named or files else "none"
        raise UserError(f"expected one file {split} ({', '.join(SUFFIXES)}) in {folder}, found {found}; put it there")
    return (named or files)[0]


def _read(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        with untrusted.opened(path) as opened:
            file: Any = gzip.GzipFile(fileobj=opened) if path.suffix == ".gz" else opened
            content = untrusted.whole(file, untrusted.LARGEST_ROWS).decode("utf-8")
            return [untrusted.parsed(line) for line in content.split("\n") if line.strip()]
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: {to_install(error, 'pyarrow')}") from None
    except (OSError, ValueError) as error:
        fix = remedy(error, "bring it again")
        raise UserError(f"cannot read {path} ({untrusted.reason(error)}); {fix}") from None


def asked(question: str, answer: Any) -> list[dict[str, Any]]:
    """Returns the conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Returns nanochat's prompt: the letter follows each choice and `=` directly, as the token to answer with."""
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\nRespond only with the letter of the correct answer."
    )


def right_letter(example: Example, text: str) -> bool:
    return text == example.answer
