"""Sends rows of numbers to tracking services on a thread, so that training never waits for them."""

from __future__ import annotations

import contextlib
import importlib
import queue
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from gptfast.errors import UserError, to_install

from .schema import Row

TRACKER_PATIENCE_S = 10.0  # how long the end of a run waits for unsent rows


TRACKER_BACKLOG = 1000  # most rows waiting to be sent; further ones are dropped and counted


class Tracker:
    """Sends rows of numbers to wandb, trackio or tensorboard on a thread of its own; kind "none" sends nothing.

    Training never waits for it: a slow or broken service only loses rows, with one warning. Raises UserError, naming
    the `flag` that asked for it, only if the package is missing.
    """

    def __init__(self, kind: str, flag: str, out_dir: str | Path, project: str, name: str, config: Row) -> None:
        self.kind = kind
        self.dropped = 0
        self._rows: queue.Queue[Row | None] = queue.Queue(TRACKER_BACKLOG)
        self._thread: threading.Thread | None = None
        module = import_tracker(kind, flag)
        if module is None:
            return
        if kind == "tensorboard":
            connect = partial(_tensorboard, module, Path(out_dir) / "tensorboard")
        else:
            connect = partial(_wandb_like, module, project, name, config)
        self._thread = threading.Thread(target=self._send, args=(connect,), daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """Queues one row; "iter" is its step, and None values are left out."""
        if self._thread is None:
            return
        try:
            self._rows.put_nowait({key: value for key, value in row.items() if value is not None})
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Waits at most TRACKER_PATIENCE_S for unsent rows; prints how many were lost."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=TRACKER_PATIENCE_S)
            self._thread.join(TRACKER_PATIENCE_S)
        lost = self.dropped + self._rows.qsize()
        if self._thread.is_alive() or lost:
            print(f"warning: {self.kind} did not take {lost} rows; metrics.jsonl has them all", file=sys.stderr)
        self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, connect: Callable[[], tuple[Callable[[Row], Any], Callable[[], Any]]]) -> None:
        try:
            send, finish = connect()
            while (row := self._rows.get()) is not None:
                send(row)
            finish()
        except BaseException as error:
            print(f"warning: {self.kind} failed and gets no more rows: {error!r}", file=sys.stderr)
            self.dropped += 1


def import_tracker(kind: str, flag: str) -> Any:
    """Returns the package of a kind, None for "none". Raises UserError, naming the `flag`, if it is missing."""
    if kind == "none":
        return None
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{flag} needs the package {kind}: {to_install(error, kind)}, or leave the flag out") from None


def _wandb_like(module: Any, project: str, name: str, config: Row) -> tuple[Callable[[Row], Any], Callable[[], Any]]:
    module.init(project=project, name=name, config=config)
    return module.log, getattr(module, "finish", lambda: None)


def _tensorboard(module: Any, folder: Path) -> tuple[Callable[[Row], Any], Callable[[], Any]]:
    writer = module.SummaryWriter(str(folder))

    def send(row: Row) -> None:
        for key, value in row.items():
            if key != "iter":
                writer.add_scalar(key, value, row["iter"])

    return send, writer.close
