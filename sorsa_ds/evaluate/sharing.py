"""How ranks share batches: each takes the next one when it is done with its last, and all see how far all are.

The counters are in the process group's own store, so that no rank ever waits for another before all is done, and a
batch holds the same prompts whoever takes it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from sorsa_ds import comm
from sorsa_ds.console import bar

T = TypeVar("T")
_numbers = itertools.count()


class Board:
    """What all ranks know of a common piece of work. Every rank makes one, in the same order as the others.

    Args:
        total, done, correct: items in all; of those, done and right before; correct None: nothing is right or wrong.
    """

    def __init__(self, total: int, done: int, correct: int | None, what: str):
        common = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self._store = dist.PrefixStore(f"evaluate-{next(_numbers)}", common)
        self._before, self._graded = (done, correct or 0), correct is not None
        self._bar = bar(total, what, "sample", done)
        self.show()

    def take(self, items: Sequence[T]) -> Iterator[T]:
        """This rank's share of the items, one after the other."""
        while (place := self._store.add("taken", 1) - 1) < len(items):
            yield items[place]

    def add(self, correct: bool | None) -> None:
        """One more item is done."""
        self._store.add("done", 1)
        self._store.add("correct", int(bool(correct)))
        self.show()

    def show(self) -> None:
        """Bring rank 0's bar up to date with all ranks."""
        if comm.rank() == 0:
            done, correct = (
                before + self._store.add(name, 0)
                for name, before in zip(("done", "correct"), self._before, strict=True)
            )
            if done and self._graded:
                self._bar.set_postfix(right=f"{100 * correct / done:.1f} %", refresh=False)
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Wait for all ranks and end the bar. A collective call."""
        if comm.world_size() > 1:
            dist.barrier()
        self.show()
        self._bar.close()
