"""CORE (Li et al., "DataComp-LM", arXiv:2406.11794): 22 tasks for base models, from DCLM's evaluation bundle.

    bundle = read(task_dir, data_dir)                 # a folder with core.yaml in it, else downloaded
    prompts(bundle["arc_easy"], 0)                    # one text for each choice, examples first

Three kinds, none of which needs a model that converses:

    multiple choice       one question, several choices: the answer is the most likely choice
    schema                several beginnings, one ending: the answer is the beginning that makes it most likely
    language modelling    a beginning and its ending: correct if every token of the ending is the most likely one

Everything that a score depends on follows nanochat (core_eval.py) to the byte: the order of the items, the few-shot
examples before each, and the texts. As there, a limit on the items also limits the pool of few-shot examples.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, overload

from gptfast import untrusted
from gptfast.errors import UserError, remedy, to_install
from train.download import download, sha256_of

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # as nanochat fetches it
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"  # of the bundle behind published scores
SETTINGS, CHANCES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
LARGEST_BUNDLE = 2**28  # bytes of the items of all tasks
LARGEST_SETTINGS = 2**18  # bytes; YAML takes a minute and some GB for a few MB
MOST_COLUMNS = 100  # of the table of chances
SHUFFLE_SEED, EXAMPLES_SEED = 1337, 1234

Kind = Literal["multiple_choice", "schema", "language_modeling"]
TEXT = (str, int, float)  # an answer may be a number
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "multiple_choice": {"query": TEXT, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": TEXT, "gold": int},
    "language_modeling": {"context": TEXT, "continuation": TEXT},
}

Folder = Path | zipfile.Path


@dataclass(frozen=True)
class CoreTask:
    """Items of one kind. `shown` few-shot examples precede each question; `delimiter` precedes each answer."""

    name: str
    kind: Kind
    shown: int
    delimiter: str
    chance: float  # accuracy of guessing
    items: Sequence[dict[str, Any]]
    sha256: str  # of the items' file


# ---- prompts


def prompts(task: CoreTask, index: int) -> list[str]:
    """Returns the texts of item `index`: one per choice or beginning; for language modelling, without the ending and
    with it."""
    item, mark = task.items[index], task.delimiter
    before = "".join(f"{_told(task, example)}\n\n" for example in shown(task, index))
    if task.kind == "multiple_choice":
        return [f"{before}{item['query']}{mark}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{before}{beginning}{mark}{item['continuation']}" for beginning in item["context_options"]]
    beginning = f"{before}{str(item['context']).strip()}{mark}"
    # The trailing space of `mark` belongs to the token of the next word, so the beginning alone must not have it.
    return [beginning.strip(), f"{beginning}{item['continuation']}"]


def shown(task: CoreTask, index: int) -> list[dict[str, Any]]:
    """Returns the few-shot examples for item `index`, drawn from the other items with `index` as the seed."""
    if not task.shown:
        return []
    candidates = [i for i in range(len(task.items)) if i != index]
    return [task.items[i] for i in random.Random(EXAMPLES_SEED + index).sample(candidates, task.shown)]


def _told(task: CoreTask, item: dict[str, Any]) -> str:
    """Returns the text of an example with its answer."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{str(item['context']).strip()}{task.delimiter}{item['continuation']}"


# ---- the bundle


def read(task_dir: str, data_dir: str, max_examples: int = 0) -> dict[str, CoreTask]:
    """Returns the bundle's tasks by name, in its order, each with its first `max_examples` items (0: all).

    `task_dir`: the bundle unpacked, or a folder with it in `core` or `eval_bundle`. Empty: the archive in
    <data_dir>/core, downloaded if missing. Raises UserError, which names the file, for anything missing, damaged or
    malformed.
    """
    root = _in_folder(Path(task_dir)) if task_dir else _in_archive(Path(data_dir) / "core" / "eval_bundle.zip")
    chances = _chances(root / CHANCES)
    room = untrusted.Allowance(LARGEST_BUNDLE, LARGEST_BUNDLE)
    tasks = [_task(root, settings, chances, max_examples, room) for settings in _settings(root / SETTINGS)]
    return {task.name: task for task in tasks}


def _in_folder(folder: Path) -> Path:
    for root in (folder, folder / "core", folder / "eval_bundle"):
        if (root / SETTINGS).is_file():
            return root
    raise UserError(f"--task_dir={folder}: no {SETTINGS} in it; give the folder of an unpacked eval_bundle.zip")


def _in_archive(path: Path) -> zipfile.Path:
    otherwise = "unpack the bundle yourself and give --task_dir=FOLDER"
    if not path.is_file():
        download(URL, path, SHA256, otherwise=otherwise)
    elif sha256_of(path) != SHA256:
        raise UserError(f"{path} is not the bundle of sha256 {SHA256[:12]}; delete it and run again, or {otherwise}")
    return zipfile.Path(path, "eval_bundle/")


def _content(path: Folder, largest: int) -> bytes:
    try:
        return untrusted.content(path, largest) if isinstance(path, Path) else path.read_bytes()
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        fix = remedy(error, "bring the bundle again")
        raise UserError(f"cannot read {path} ({untrusted.reason(error)}); {fix}") from None


def _text(path: Folder) -> str:
    try:
        return _content(path, LARGEST_SETTINGS).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} ({error}); bring the bundle again") from None


def _settings(path: Folder) -> list[dict[str, Any]]:
    """Returns the settings of each task in core.yaml."""
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"reading {path} needs PyYAML: {to_install(error, 'pyyaml')}") from None
    try:

        class WithoutAliases(yaml.SafeLoader):
            def compose_node(self, parent: Any, index: Any) -> Any:
                if self.check_event(yaml.AliasEvent):
                    raise ValueError("it has aliases (*name), which can stand for any number of values")
                return super().compose_node(parent, index)

        tasks = yaml.load(_text(path), WithoutAliases)["icl_tasks"]
        for task in tasks:
            if not (isinstance(task["label"], str) and isinstance(task["dataset_uri"], str)):
                raise TypeError("a label and a dataset_uri are texts")
            if task["icl_task_type"] not in get_args(Kind):
                raise ValueError(f"icl_task_type {task['icl_task_type']}: known are {', '.join(get_args(Kind))}")
            if not (isinstance(task["num_fewshot"][0], int) and task["num_fewshot"][0] >= 0):
                raise ValueError(f"num_fewshot {task['num_fewshot']}: a list whose first is a number from 0 up")
            if not isinstance(task.get("continuation_delimiter", " "), str):
                raise TypeError("a continuation_delimiter is a text")
    except UserError:
        raise
    except (yaml.YAMLError, *untrusted.STRANGE) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else untrusted.reason(error)
        raise UserError(f"{path}: {reason}; bring the bundle again") from None
    return tasks


def _chances(path: Folder) -> dict[str, float]:
    """Returns the accuracy of guessing, by task; the file has percent."""
    text = _text(path)
    try:
        rows = csv.DictReader(text.splitlines())
        if len(rows.fieldnames or ()) > MOST_COLUMNS:
            raise ValueError(f"it has more than {MOST_COLUMNS} columns")
        chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        if not all(0 <= chance < 1 for chance in chances.values()):
            raise ValueError("a random baseline is at least 0 and below 100")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: no table of Eval Task and Random baseline ({error!r}); bring it again") from None
    return chances


def _task(
    root: Folder, settings: dict[str, Any], chances: dict[str, float], max_examples: int, room: untrusted.Allowance
) -> CoreTask:
    name, shown = settings["label"], settings["num_fewshot"][0]
    if name not in chances:
        raise UserError(f"{root / CHANCES} has no random baseline of {name}; add a line")
    within = PurePosixPath(settings["dataset_uri"])
    if within.is_absolute() or ".." in within.parts:
        raise UserError(f"{root / SETTINGS}: dataset_uri {within} leads out of the bundle")
    path = root / DATA / str(within)
    content = _content(path, untrusted.LARGEST_ROWS)
    lines = _items(path, content, settings["icl_task_type"], room)
    random.Random(SHUFFLE_SEED).shuffle(lines)
    items = Items(lines[:max_examples] if max_examples else lines)
    if len(items) <= shown:
        raise UserError(f"{name} shows {shown} examples before each item and has {len(items)} items; it needs more")
    return CoreTask(
        name, settings["icl_task_type"], shown, settings.get("continuation_delimiter", " "), chances[name], items,
        hashlib.sha256(content).hexdigest(),
    )  # fmt: skip


@dataclass(frozen=True)
class Items(Sequence[dict[str, Any]]):
    """Items that were checked, each parsed when it is asked for."""

    lines: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> Any:
        return list(map(untrusted.parsed, self.lines[i])) if isinstance(i, slice) else untrusted.parsed(self.lines[i])


def _items(path: Folder, content: bytes, kind: str, room: untrusted.Allowance) -> list[bytes]:
    """Returns the lines of items, each of which is one of this kind."""
    items = []
    for number, line in enumerate(io.BytesIO(content), 1):
        if not line.strip():
            continue
        try:
            item = untrusted.parsed(line.decode("utf-8"))
            wrong = [name for name, type_ in FIELDS[kind].items() if not isinstance(item[name], type_)]
            options = item.get("choices") or item.get("context_options") or ()
            if wrong or ("gold" in FIELDS[kind] and not 0 <= item["gold"] < len(options)):
                raise ValueError(f"{' and '.join(wrong) or 'gold'} cannot be used")
            room.take(line)
            items.append(line)
        except untrusted.STRANGE as error:
            reason = f"no {error}" if isinstance(error, KeyError) else untrusted.reason(error)
            raise UserError(f"{path}, line {number}: no item of {kind} ({reason}); bring the bundle again") from None
    return items
