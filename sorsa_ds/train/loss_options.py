"""How a run computes its losses: found out on its model before the first step, and told."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from sorsa_ds.config.batch_size import shard_length
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan, collate
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.plan.logits import loss_chunk
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.train.chunked_loss import why_not_chunked
from sorsa_ds.train.loss import LossOptions, summed_loss
from sorsa_ds.train.padding import Padding, choose_padding, padded_probe
from sorsa_ds.train.sequence_shards import check_shards
from sorsa_ds.train.tried_model import eval_mode, model_of

GAP_FP32, GAP_NARROW = 1e-5, 1e-2
"""By how much a loss in chunks may differ relatively from that of all logits: by rounding."""


def choose_options(
    engine: nn.Module,
    config: RunConfig,
    batches: BatchPlan | StreamBatches,
    step: int,
    device: torch.device,
    sequence: SequenceParallel,
) -> LossOptions:
    """How the losses of a run are computed; the run's first lines say it. A collective call.

    Args:
        batches: the model is tried on this rank's first micro-batch of the next step.
        step: the number of finished steps. If none is left, the model is tried on a micro-batch of dummies.
        sequence: the ranks that compute a micro-batch together.

    Raises:
        ValueError: `train.loss_chunk` is a number, and the loss of this model cannot be computed in chunks; on every
            rank. Or ranks that compute together find another result than each alone.
    """
    with full_fp32_products():  # a GPU's rounding to TF32 would be taken for a difference
        with sequence.whole():
            found = _found_alone(engine, config, batches, step, device)
            options = replace(found, smoothing=config.train.label_smoothing)
        check_shards(engine, sequence, device, config.train.precision, options.padding)
    if options.smoothing:
        say(f"Loss: trained on with {options.smoothing:g} label smoothing, held out without (train.label_smoothing).")
    return options


def _found_alone(
    engine: nn.Module, config: RunConfig, batches: BatchPlan | StreamBatches, step: int, device: torch.device
) -> LossOptions:
    """What `choose_options` returns. Each rank tries the model on whole sequences."""
    size = batches.micro_batch_size
    left = step < batches.steps
    batch = batches.micro_batches(step)[0] if left else collate([None] * size, batches.pad_token_id)
    precision, asked = config.train.precision, config.train.loss_chunk
    padding, told = choose_padding(engine, batch, device, precision)
    say(f"Right padding: {told}.")
    model = model_of(engine)
    sharing = config.train.sequence_parallel
    whole = math.ceil((batches.micro_batch_tokens or 0) / sharing)
    positions = max(size * shard_length(config.data.max_length, sharing), whole)
    chunk = loss_chunk(asked, positions, model.config.get_text_config().vocab_size)
    if not chunk:
        return LossOptions(padding)
    why = why_not_chunked(model) or chunks_differ(engine, batch, device, padding, precision)
    if why is None:
        say(f"Loss: the logits of {chunk} positions at a time, of at most {positions} (train.loss_chunk).")
        return LossOptions(padding, chunk)
    if asked != "auto":
        raise ValueError(
            f"train.loss_chunk={asked}: {why}; set train.loss_chunk=0, and a smaller micro-batch if needed"
        )
    say(f"Loss: the logits of up to {positions} positions at once; {why} (train.loss_chunk).")
    return LossOptions(padding)


@torch.no_grad()
def chunks_differ(
    engine: nn.Module, batch: dict[str, Tensor], device: torch.device, padding: Padding, precision: str
) -> str | None:
    """Why the loss in chunks is not that of all logits, in words; None where it is. A collective call.

    Args:
        batch: a collated micro-batch of this rank; the beginning of its longest example is computed.
    """
    probe = padded_probe(batch).to(device)
    name = type(model_of(engine)).__name__
    with eval_mode(engine):
        whole = summed_loss(engine, probe, LossOptions(padding)).item()
        try:
            gap = abs(summed_loss(engine, probe, LossOptions(padding, chunk=1)).item() - whole) / abs(whole)
            why = f"the loss of {name} in chunks differs from that of all its logits by {gap:.1%}"
        except Exception as error:  # any: it is the model's own code, most of which is silenced here
            gap, why = math.inf, f"{name} does not compute the loss in chunks ({type(error).__name__}: {error})"
    gap = max(collectives.gather_lists([gap if math.isfinite(gap) else math.inf]))
    if gap <= (GAP_FP32 if precision == "fp32" else GAP_NARROW):
        return None
    return why
