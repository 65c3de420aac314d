"""How ranks share batches: each takes the next one when its last is done, and each sees how far all ranks are.

The counters are in the process group's own store, so that no rank waits for another before everything is done, and a
batch holds the same prompts whichever rank takes it. The wait at the end is no collective call either, because a batch
of long answers may take longer than the time-out of one.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import bar

T = TypeVar("T")
PATIENCE = 2 * 3600.0
"""Seconds without a new sample from any rank, after which a rank that waits for the others gives up."""

_LOOK_SECONDS = 0.2
_numbers = itertools.count()


class Board:
    """What all ranks know of a common piece of work. Every rank makes one, in the same order as the others.

    Args:
        total: number of items.
        done: how many of them were finished before this process started.
        correct: how many of those are right; None where an item is neither right nor wrong.
        what: the progress bar's label.
    """

    def __init__(self, total: int, done: int, correct: int | None, what: str):
        common = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self._store = dist.PrefixStore(f"evaluate-{next(_numbers)}", common)
        self._before, self._graded = (done, correct or 0), correct is not None
        self._bar = bar(total, what, "sample", done)
        self.show()

    def take(self, items: Sequence[T]) -> Iterator[T]:
        """The items that fall to this rank, one after the other."""
        while (place := self._store.add("taken", 1) - 1) < len(items):
            yield items[place]

    def add(self, correct: bool | None) -> None:
        """Count one more item as done."""
        self._store.add("done", 1)
        self._store.add("correct", int(bool(correct)))
        self.show()

    def show(self) -> None:
        """Bring the progress bar of rank 0 up to date with all ranks."""
        if collectives.rank() == 0:
            done, correct = (
                before + self._store.add(name, 0)
                for name, before in zip(("done", "correct"), self._before, strict=True)
            )
            if done and self._graded:
                self._bar.set_postfix(right=f"{100 * correct / done:.1f} %", refresh=False)
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Wait for all ranks while the bar goes on, then end it. Every rank must call this.

        Raises:
            PeerError: no other rank has finished anything for `PATIENCE` seconds.
        """
        self._store.add("left", 1)
        seen, since = -1, time.monotonic()
        while self._store.add("left", 0) < collectives.world_size():
            if (done := self._store.add("done", 0)) != seen:
                seen, since = done, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise collectives.PeerError(
                    f"stopped because the other ranks have finished no sample for {PATIENCE:.0f} s"
                )
            time.sleep(_LOOK_SECONDS)
            self.show()
        self.show()
        self._bar.close()
