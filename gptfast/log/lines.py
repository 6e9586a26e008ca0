"""Console lines of a training run, in nanoGPT's wording, so that whatever parses its logs parses these."""

from __future__ import annotations

from gptfast.mfu import format_mfu


def iteration_line(iteration: int, loss: float, ms: float, mfu_palm: float | None) -> str:
    """Returns the line of an iteration. Its MFU follows the PaLM convention, 6N + 12·L·H·Q·T FLOPs per token."""
    return f"iter {iteration}: loss {loss:.4f}, time {ms:.2f}ms, mfu {format_mfu(mfu_palm)}"


def evaluation_line(iteration: int, train_loss: float, val_loss: float) -> str:
    """Returns the line of an evaluation before the update `iteration`."""
    return f"step {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"


def whole_split_line(loss: float, windows: int, block_size: int) -> str:
    """Returns the line of the final loss over every window of the validation split."""
    return f"whole validation split: val loss {loss:.4f} over {windows} windows of {block_size}"
