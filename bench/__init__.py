"""Measuring: `python -m bench`. One timing module, rows that carry their machine, and figures drawn from rows alone."""
