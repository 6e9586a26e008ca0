"""SmolTalk (Allal et al., arXiv:2502.02737), the small one: conversations about everything, to learn from."""

from __future__ import annotations

from collections.abc import Sequence

from gptfast.chat.conversation import messages_of
from train.tasks.task import Example, Mapped, Task, Where, rows


def examples(split: str, where: Where) -> Sequence[Example]:
    return Mapped(rows(where, "smoltalk", split, "HuggingFaceTB/smol-smoltalk"), lambda row: Example(messages_of(row)))


SMOLTALK = Task("smoltalk", "conversations", examples)
