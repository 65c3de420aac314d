"""What is common to the checks that try a run's model before its first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_TOKENS = 32
"""How many tokens of an example a model is tried on."""


def model_of(engine: nn.Module) -> PreTrainedModel:
    """The model inside an engine, or the model itself."""
    return cast(PreTrainedModel, getattr(engine, "module", engine))


@contextmanager
def eval_mode(engine: nn.Module) -> Iterator[None]:
    """Context in which a model is in eval mode; afterwards it is in the mode that it was in."""
    training = engine.training
    engine.eval()
    try:
        yield
    finally:
        engine.train(training)


def first_tokens(batch: dict[str, Tensor]) -> Tensor:
    """The first PROBE_TOKENS tokens, or fewer, of the longest example of a collated batch; two at least."""
    mask_BL = batch["attention_mask"].bool()
    longest = int(mask_BL.sum(1).argmax())
    ids_L = batch["input_ids"][longest, mask_BL[longest]][:PROBE_TOKENS]
    # A rank that has no example in the batch computes with the others all the same.
    return ids_L if len(ids_L) > 1 else torch.tensor([0, 1])
