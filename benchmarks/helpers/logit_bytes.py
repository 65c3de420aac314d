"""The most bytes of logits that exist at one time in a forward and backward pass."""

import torch
from torch import nn

from benchmarks.helpers.live_bytes import LiveBytes
from sorsa_ds.train.loss import LossOptions, summed_loss
from sorsa_ds.train.micro_batch import MicroBatch


def logit_bytes(model: nn.Module, micro_batch: MicroBatch, options: LossOptions, vocabulary: int) -> int:
    """Peak bytes of the tensors whose last size is the vocabulary's, in a forward and backward pass.

    Logits, their casts, their probabilities and their gradients are such tensors; parameters and their gradients are
    not counted.

    Args:
        vocabulary: it must be no other size of the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with LiveBytes(lambda tensor: tensor.dim() > 0 and tensor.shape[-1] == vocabulary) as counter:
        torch.autograd.grad(summed_loss(model, micro_batch, options), trained, allow_unused=True)
    return counter.peak
