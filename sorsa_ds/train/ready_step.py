"""The micro-batches of an optimizer step, made ready in a thread while the step before it is computed."""

import math
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sorsa_ds.data.batches import BatchPlan, aligned
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.background import in_background
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.sequence_shards import shard


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """This rank's micro-batches of a step, and the numbers of tokens that all ranks have in theirs.

    micro_batches: on the CPU, in page-locked memory where they go to a GPU.
    learned: learned tokens. tokens: all tokens but padding. squares: the squares of the examples' lengths, summed.
    """

    micro_batches: list[MicroBatch]
    learned: int
    tokens: int
    squares: int


@dataclass(slots=True)
class _Counted:
    """Micro-batches whose counts are under way: (learned tokens, tokens, squares), to be read when `work` is done."""

    step: int
    micro_batches: list[MicroBatch]
    counts: Tensor
    work: dist.Work | None


class ReadySteps:
    """Makes steps ready. No GPU is asked for anything: the ranks add up their counts between their CPUs.

    Args:
        batches: the batches of all steps.
        group: a group of all ranks, over which their CPUs communicate; None: the default group.
        device: the device to which the micro-batches will go.
        sequence: the ranks that compute a micro-batch together.
        longest: lengths are aligned, but not beyond this one, see `sorsa_ds.data.batches.aligned`. None: they are not.
    """

    def __init__(
        self,
        batches: BatchPlan | StreamBatches,
        group: dist.ProcessGroup | None,
        device: torch.device,
        sequence: SequenceParallel,
        longest: int | None = None,
    ):
        self._batches, self._sequence, self._group, self._pinned = batches, sequence, group, device.type == "cuda"
        self._longest = longest
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None
        self._counted: _Counted | None = None

    def take(self, step: int) -> ReadyStep:
        """A step, and begin in a thread with the one after it. A collective call.

        Raises:
            ValueError: a stream cannot be read; on every rank.
        """
        counted = self._counted
        if counted is None or counted.step != step:
            counted = self._count(step)
        self._counted = None
        # A stream reads ahead by itself; its state, which checkpoints keep, is that behind the step it was asked for.
        if isinstance(self._batches, BatchPlan) and step + 1 < self._batches.steps:
            self._ahead = step + 1, in_background(lambda: self._make(step + 1), "batches")
        if counted.work is not None:
            counted.work.wait()
        return ReadyStep(counted.micro_batches, *counted.counts.numpy().tolist())

    def count_ahead(self) -> None:
        """Begin to add up the counts of the step that is made ready, so that nobody waits for them later.

        A collective call.
        """
        if self._ahead is not None:
            self._counted = self._count(self._ahead[0])

    def _count(self, step: int) -> _Counted:
        """The micro-batches of a step, with counts that are on their way to all ranks."""
        ahead, self._ahead = self._ahead, None
        made = ahead[1].result() if ahead is not None and ahead[0] == step else self._make(step)
        each = torch.tensor([(one.learned, one.tokens, one.squares) for one in made])
        counts, work = each.sum(0), None
        if collectives.world_size() > 1:
            work = dist.all_reduce(counts, group=self._group, async_op=True)
        return _Counted(step, made, counts, work)

    def _make(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        made = [self._shard(batch) for batch in self._batches.micro_batches(step)]
        return [one.pinned() for one in made] if self._pinned else made

    def _shard(self, batch: dict[str, Tensor]) -> MicroBatch:
        """This rank's positions of a batch. The squares of its examples' lengths are counted by one rank of a group."""
        if self._longest is not None:
            most = self._batches.micro_batch_tokens or math.inf
            fitting = most // len(batch["input_ids"])  # of the positions that a micro-batch may have
            batch = aligned(batch, self._batches.pad_token_id, int(min(self._longest, fitting)))
        if self._sequence.size == 1:
            return MicroBatch.of(batch)
        squares = MicroBatch.of(batch).squares if self._sequence.rank == 0 else 0
        return replace(MicroBatch.of(shard(batch, self._sequence)), squares=squares)
