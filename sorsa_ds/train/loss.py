"""The training loss: the mean over the learned tokens of the whole global batch.

Shapes: B sequences, L positions, P positions at which any sequence learns, K learned tokens, C vocabulary.
"""

import functools
import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.runtime import collectives


def learned_tokens(batch: dict[str, Tensor]) -> int:
    """The number of tokens of a batch that are learned: not the first of a sequence, which nothing precedes."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum over the learned tokens of -log p(token | before), 0-D in float32 or better; 0 (with a graph) if none is.

    batch: input_ids, attention_mask, labels, each (B, L); labels are -100 where nothing is learned.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    labels_BL = batch["labels"][:, 1:]
    learned = labels_BL != IGNORED
    # mypy takes the __hash__ of a class's instances for that of the class.
    if takes_positions(type(getattr(model, "module", model))):  # type: ignore[arg-type]
        # The output head computes only where something is learned: prompts and padding would be most of its work.
        positions_P = learned.any(0).nonzero().view(-1)
        labels_BL, learned = labels_BL[:, positions_P], learned[:, positions_P]
        some = positions_P if len(positions_P) else 1  # the last, for the sake of the graph
        logits = model(**inputs, logits_to_keep=some).logits[:, : len(positions_P)]
    else:
        logits = model(**inputs).logits[:, :-1]
    logits_KC = logits[learned]  # only these are widened to fp32
    return nn.functional.cross_entropy(logits_KC.float(), labels_BL[learned], reduction="sum")


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
