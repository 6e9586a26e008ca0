"""The tasks for training and evaluation: one file each, and this list of them.

task = find("gsm8k")                             # or jsonl:PATH, a file of conversations
example = task.examples("test", Where())[0]
task.passes(example, "... #### 18")
"""

from __future__ import annotations

from gptfast.errors import UserError, nearest
from train.tasks.arc import ARC_CHALLENGE, ARC_EASY
from train.tasks.arithmetic import ADDITION, ARITHMETIC
from train.tasks.gsm8k import GSM8K
from train.tasks.humaneval import HUMANEVAL
from train.tasks.identity import IDENTITY
from train.tasks.jsonl import of_file
from train.tasks.mmlu import MMLU
from train.tasks.simplespelling import SIMPLESPELLING
from train.tasks.smoltalk import SMOLTALK
from train.tasks.spellingbee import SPELLINGBEE
from train.tasks.task import Example, Identity, Task, Where

__all__ = ["CHATCORE", "TASKS", "Example", "Identity", "Task", "Where", "find", "judged"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ARC_EASY, ARC_CHALLENGE, MMLU, GSM8K, HUMANEVAL, SPELLINGBEE, SIMPLESPELLING, SMOLTALK, IDENTITY, ARITHMETIC,
        ADDITION,
    )
}  # fmt: skip
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")  # ChatCORE is their mean accuracy above chance


def find(name: str) -> Task:
    """Returns the task of this name. Raises UserError, which names the nearest one, for an unknown name."""
    if name.startswith("jsonl:"):
        return of_file(name.removeprefix("jsonl:"))
    if name not in TASKS:
        raise UserError(f"unknown task {name}{nearest(name, TASKS)}; a file of conversations is jsonl:PATH")
    return TASKS[name]


def judged(names: str) -> list[Task]:
    """Returns the tasks of a comma-separated list, or of `all`. Raises UserError for one without a judge."""
    if names == "all":
        return [task for task in TASKS.values() if task.kind != "conversations"]
    tasks = [find(name.strip()) for name in names.split(",") if name.strip()]
    for task in tasks:
        if task.kind == "conversations":
            raise UserError(f"{task.name} has conversations to learn from and no judge; leave it out of --tasks")
    return tasks
