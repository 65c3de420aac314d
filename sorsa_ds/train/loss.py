"""The training loss: the mean over the learned tokens of the whole global batch.

Shapes: B sequences, L positions, P positions at which any sequence learns, K learned tokens, C vocabulary.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.model.packed_attention import packed_attention
from sorsa_ds.runtime import collectives


def learned_tokens(batch: dict[str, Tensor]) -> int:
    """The number of tokens of a batch that are learned: not the first of a sequence, which nothing precedes."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum over the learned tokens of -log p(token | before), 0-D in float32 or better; 0 (with a graph) if none is.

    batch: input_ids, attention_mask, labels, each (B, L); labels are -100 where nothing is learned. With position_ids,
        each sequence is a packed row of examples that do not see one another.
    """
    return _forward(model, batch)[0]


def training_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`summed_loss` of a micro-batch, and the loss by which its router learns to use all experts alike.

    The latter is 0-D and already has its coefficient. It is None unless the model computes it, which a mixture of
    experts does where its config.json has `output_router_logits`. It is a mean over the micro-batch, as transformers
    adds it to its own loss.

    Raises:
        ValueError: the model computes it and has no coefficient for it.
    """
    loss, outputs = _forward(model, batch)
    balance = getattr(outputs, "aux_loss", None)
    if balance is None:
        return loss, None
    within = getattr(model, "module", model)
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


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ModelOutput]:
    """The loss as `summed_loss` says, and what the model returned."""
    within = cast(PreTrainedModel, getattr(model, "module", model))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if (position_ids := batch.get("position_ids")) is not None:
        inputs |= packed_attention(within, position_ids)
    labels_BL = batch["labels"][:, 1:]
    learned = labels_BL != IGNORED
    # mypy takes the __hash__ of a class's instances for that of the class.
    if takes_positions(type(within)):  # type: ignore[arg-type]
        # The output head computes only where something is learned: prompts and padding would be most of its work.
        positions_P = learned.any(0).nonzero().view(-1)
        labels_BL, learned = labels_BL[:, positions_P], learned[:, positions_P]
        some = positions_P if len(positions_P) else 1  # the last, for the sake of the graph
        outputs = model(**inputs, logits_to_keep=some)
        logits = outputs.logits[:, : len(positions_P)]
    else:
        outputs = model(**inputs)
        logits = outputs.logits[:, : labels_BL.shape[1]]
    logits_KC = logits[learned]  # only these are widened to fp32
    return nn.functional.cross_entropy(logits_KC.float(), labels_BL[learned], reduction="sum"), outputs


@functools.cache
def takes_positions(model_class: type[nn.Module]) -> bool:
    """Whether a model can be asked for the logits of some positions only. Not all models outside transformers can."""
    own = model_class.__module__.startswith("transformers.")
    return own and "logits_to_keep" in inspect.signature(model_class.forward).parameters


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> float:
    """Nats per learned token over all ranks' batches, in eval mode. A collective call: as many batches on each."""
    training = model.training
    model.eval()
    loss, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        loss += summed_loss(model, {key: value.to(device) for key, value in batch.items()})
        tokens += learned_tokens(batch)
    model.train(training)
    return (collectives.total(loss, device) / collectives.total(tokens, device)).item()
