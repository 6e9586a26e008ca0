"""Measuring: `python -m bench`. One timing module, rows that carry their machine, and figures drawn from rows alone."""

from gptfast.parallel import settle

settle()  # before any page here imports torch
