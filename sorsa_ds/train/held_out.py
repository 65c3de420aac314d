"""The loss on held-out data: over all of it, and over each of its sources."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sorsa_ds.data.batches import eval_batches, eval_rounds
from sorsa_ds.data.token_store import Examples
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.runtime.console import tracked
from sorsa_ds.train.loss import LossOptions, mean_loss
from sorsa_ds.train.sequence_shards import shard

Batches = Iterator[dict[str, Tensor]]


def held_out_losses(
    model: nn.Module,
    sources: Mapping[str, Examples],
    micro_batch_size: int,
    pad_token_id: int,
    device: torch.device,
    checked: Callable[[Batches], Batches],
    options: LossOptions,
    sequence: SequenceParallel,
) -> tuple[float, dict[str, float]]:
    """Held-out loss in nats per learned token. A collective call.

    Args:
        sources: name -> held-out examples; one or more.
        checked: gives the same batches, and stops the run between two of them when a signal has come.
        options: how the run computes losses.
        sequence: the ranks that compute a micro-batch together.

    Returns:
        (the loss over all learned tokens of all sources; that of each source, where there are several).
    """
    losses: dict[str, float] = {}
    for name, examples in sources.items():
        batches = eval_batches(examples, sequence.data_rank, sequence.data_ranks, micro_batch_size, pad_token_id)
        total = eval_rounds(examples, sequence.data_ranks, micro_batch_size)
        what = "held-out loss" if len(sources) == 1 else f"held-out loss, {name}"
        shown = tracked(checked(batches), total, what, "batch", stays=False)
        losses[name] = mean_loss(model, (shard(batch, sequence) for batch in shown), device, options)
    if len(losses) == 1:
        return losses.popitem()[1], {}
    # The first token of an example is never learned, so these are the very tokens that each mean is over.
    learned = {name: examples.counts.learned_tokens for name, examples in sources.items()}
    return math.fsum(losses[name] * learned[name] for name in losses) / sum(learned.values()), losses
