"""Progress bars on what takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS = 2.0
_REFRESH = 0.1


@contextmanager
def bar(total: int, what: str, shown: bool, unit: str = "pass") -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done."""
    if not shown:
        yield lambda more: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=sys.stderr,
        leave=False,
        delay=_SECONDS,
        mininterval=_REFRESH,
    ) as counter:
        yield counter.update
