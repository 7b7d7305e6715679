"""What a run leaves behind: one SQLite file, written step by step, readable while it grows."""

from dyndiag.store.reader import Run
from dyndiag.store.writer import Row, Writer

__all__ = ["Row", "Run", "Writer"]
