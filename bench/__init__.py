"""Measuring: `python -m bench`. One timing module, rows that carry their machine, and figures drawn from rows alone.

`bench.profile(step)` says where the time of any function goes.
"""

from typing import Any

from gptfast.runtime import set_up_process

set_up_process()  # before any page here imports torch


def __getattr__(name: str) -> Any:
    if name == "profile":  # the page is callable, and imported when it is asked for
        import importlib

        return importlib.import_module("bench.profile")
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
