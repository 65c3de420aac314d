"""The training loss: the mean over the learned tokens of the whole global batch.

Shapes: B sequences, L positions, P positions at which any sequence learns, K learned tokens, C vocabulary.
"""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sorsa_ds.runtime import collectives
from sorsa_ds.train.chunked_loss import losses_in_chunks
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.padding import Padding, model_inputs
from sorsa_ds.train.tried_model import eval_mode, model_of


@dataclass(frozen=True, slots=True)
class LossOptions:
    """How a run computes its losses. But for the smoothing, the values do not change with it, except for rounding.

    padding: what the model is given for the sake of right padding.
    chunk: positions whose logits exist at once at most; 0: all.
    smoothing: `train.label_smoothing`, which only the losses that are trained on have.
    """

    padding: Padding = Padding.MASK
    chunk: int = 0
    smoothing: float = 0.0


def summed_loss(
    model: nn.Module, batch: MicroBatch | dict[str, Tensor], options: LossOptions = LossOptions()
) -> Tensor:
    """Sum over the learned tokens of -log p(token | before), 0-D in float32 or better; 0 (with a graph) if none is.

    Args:
        batch: on the model's device. One that is collated only is made ready first, see `MicroBatch.of`.
    """
    return _forward(model, MicroBatch.of(batch), replace(options, smoothing=0.0))[0]


def training_losses(
    model: nn.Module, batch: MicroBatch | dict[str, Tensor], options: LossOptions = LossOptions()
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of a micro-batch that is trained on, and the loss by which its router uses all experts alike.

    The former is `summed_loss`; with smoothing e, of each learned token (1 - e) times that and e times the mean of
    -log p over the whole vocabulary, as transformers' `LabelSmoother` has it.

    The latter is 0-D and already has its coefficient. It is None unless the model computes it, which a mixture of
    experts does where its config.json has `output_router_logits`. It is a mean over the micro-batch, as transformers
    adds it to its own loss.

    Raises:
        ValueError: the model computes it and has no coefficient for it.
    """
    loss, outputs = _forward(model, MicroBatch.of(batch), options)
    balance = getattr(outputs, "aux_loss", None)
    if balance is None:
        return loss, None
    within = model_of(model)
    coefficient = getattr(within, "router_aux_loss_coef", None)
    if coefficient is None:
        raise ValueError(
            f"{type(within).__name__} computes a loss of its router and has no router_aux_loss_coef for it: set "
            f"output_router_logits to false in the model's config.json"
        )
    return loss, coefficient * balance


def router_rows(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The row of the table at the beginning of a run on the loss of the router, where there is one."""
    if not getattr(model.config, "output_router_logits", False) or not hasattr(model, "router_aux_loss_coef"):
        return []
    told = f"{model.router_aux_loss_coef:g} x the model's load-balancing loss is added, as its config.json asks"
    return [("router loss", f"{told} (output_router_logits); logged losses are without it")]


def _forward(model: nn.Module, micro_batch: MicroBatch, options: LossOptions) -> tuple[Tensor, ModelOutput]:
    """The loss as `training_losses` says, and what the model returned."""
    within = model_of(model)
    places_K, labels_K = micro_batch.places_of_all, micro_batch.labels
    with model_inputs(within, micro_batch, options.padding) as inputs:
        # mypy takes the __hash__ of a class's instances for that of the class.
        if takes_positions(type(within)):  # type: ignore[arg-type]
            # The output head computes only where something is learned: prompts and padding would be most of its work.
            places_K = micro_batch.places
            # Where nothing is learned, the last position is computed for the sake of the graph.
            inputs["logits_to_keep"] = micro_batch.positions if len(micro_batch.positions) else 1
        if options.chunk:  # also where one chunk holds everything: under ZeRO-3 all ranks take the same way
            with losses_in_chunks(within, places_K, labels_K, options.chunk, options.smoothing) as summed:
                outputs = model(**inputs)
                return summed(), outputs
        outputs = model(**inputs)
    logits_KC = outputs.logits.flatten(0, 1)[places_K]  # only these are widened to fp32
    loss = nn.functional.cross_entropy(logits_KC.float(), labels_K, reduction="sum", label_smoothing=options.smoothing)
    return loss, outputs


@functools.cache
def takes_positions(model_class: type[nn.Module]) -> bool:
    """Whether a model can be asked for the logits of some positions only. Not all models outside transformers can."""
    own = model_class.__module__.startswith("transformers.")
    return own and "logits_to_keep" in inspect.signature(model_class.forward).parameters


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[MicroBatch | dict[str, Tensor]],
    device: torch.device,
    options: LossOptions = LossOptions(),
) -> float:
    """Nats per learned token over all ranks' batches, in eval mode. A collective call: as many batches on each.

    Args:
        batches: on the CPU.
    """
    loss, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    with eval_mode(model):
        for batch in batches:
            ready = MicroBatch.of(batch)
            loss += summed_loss(model, ready.to(device, non_blocking=True), options)
            tokens += ready.learned
    return (collectives.total(loss, device) / collectives.total(tokens, device)).item()
