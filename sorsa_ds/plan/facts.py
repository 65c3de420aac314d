"""The model that a job would train, from its configuration alone: every parameter, and what a forward pass keeps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.loading import skeleton
from sorsa_ds.plan.activations import Kept, kept_for_backward
from sorsa_ds.plan.job import Job
from sorsa_ds.surgery import Target, operate, select

Kind = Literal["residual", "frozen", "factor"]


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter as a rank's model holds it: W_r or a part of it, another frozen one, or U, s or V."""

    kind: Kind
    numel: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Of the whole parameter."""
        return self.numel * self.itemsize

    def block(self, ranks: int) -> int:
        """Numbers of one of ZeRO-3's equal flat blocks."""
        return -(-self.numel // ranks)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan needs of the model.

    parameters: tied ones once. linears: (m, n) of every linear that is frozen whole, as the output head. kept: what a
    forward pass of one micro-batch keeps for backward. hidden, vocabulary, layers: sizes; layers are blocks that
    gradient checkpointing recomputes.
    """

    parameters: list[Held]
    targets: list[Target]
    linears: list[tuple[int, int]]
    kept: Kept
    hidden: int
    vocabulary: int

    @property
    def trainable(self) -> int:
        """Numbers of U, s and V."""
        return sum(p.numel for p in self.parameters if p.kind == "factor")

    @property
    def frozen(self) -> int:
        """Weights of the pre-trained model: the adapted ones and the others, however they are stored."""
        others = sum(p.numel for p in self.parameters if p.kind == "frozen")
        return others + sum(target.out_features * target.in_features for target in self.targets)


def facts(folder: Path, job: Job) -> Facts:
    """Build the job's model without memory for its parameters.

    Args:
        folder: has the model's config.json; weights are not needed.

    Raises:
        ValueError: it is no causal language model, or has no such targets or ranks.
    """
    model = skeleton(folder, job.config.loading)
    model.to("meta")
    targets = select(model, job.config.sorsa)
    operate(model, targets, job.config.sorsa, job.precision, job.storage)
    residuals = {f"{target.name}.{leaf}" for target in targets for leaf in job.storage.names}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name not in residuals and parameter.is_floating_point():
            parameter.data = parameter.data.to(job.precision.residual_dtype)
    parameters = [
        Held("factor" if p.requires_grad else "residual" if name in residuals else "frozen", p.numel(), p.itemsize)
        for name, p in model.named_parameters()
    ]
    text = model.config.get_text_config()
    return Facts(
        parameters,
        targets,
        [_shape(module) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)],
        kept_for_backward(model, job.resolved.micro_batch_size, job.config.data.max_length, _dtype(model)),
        text.hidden_size,
        text.vocab_size,
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    m, n = module.weight.shape
    return (n, m) if isinstance(module, Conv1D) else (m, n)


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype
