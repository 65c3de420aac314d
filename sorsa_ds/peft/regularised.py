"""The factors of a PEFT model as the regulariser takes them: fragments of what the Trainer's optimizer updates.

Without DeepSpeed these are the parameters themselves, whole on every rank. With it they are its fp32 masters, which
`sorsa_ds.engine.masters` finds on any ZeRO stage.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import Fragment, Masters, inner_optimizer, locate_masters, trained_shapes
from sorsa_ds.engine.regularize import ShardedRegularizer
from sorsa_ds.peft.layer import SorsaLayer
from sorsa_ds.sorsa.regularizer import Regularizer

WHOLE = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_HPU,
    DistributedType.MULTI_MLU, DistributedType.MULTI_MUSA, DistributedType.MULTI_NEURON, DistributedType.MULTI_NPU,
    DistributedType.MULTI_SDAA, DistributedType.MULTI_XPU,
)  # fmt: skip
"""The ways in which accelerate runs that leave every rank whole parameters, and their gradients averaged."""


def trained_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The U and V of a model that are trained now, by name.

    Raises:
        ValueError: the model has no U and V that are trained.
    """
    found = {
        f"{name}.sorsa_factors.{adapter}.{leaf}": getattr(tensors, leaf)
        for name, layer in model.named_modules()
        if isinstance(layer, SorsaLayer)
        for adapter, tensors in layer.sorsa_factors.items()
        for leaf in ("U", "V")
    }
    trained = {name: parameter for name, parameter in found.items() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            "SorsaCallback: the model has no SORSA factors that are trained. Give the trainer "
            "peft_config=SorsaConfig(...), or a model of get_peft_model(model, SorsaConfig(...)); a saved adapter goes "
            "on with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return trained


class _EngineView:
    """What `sorsa_ds.engine.masters` asks of a DeepSpeed engine, from what a callback gets of a Trainer."""

    def __init__(self, model: nn.Module, optimizer: Any):
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self.module, self.optimizer = model, optimizer
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        stages = {DeepSpeedZeroOptimizer_Stage3: 3, DeepSpeedZeroOptimizer: 2}
        self._stage = next((stage for kind, stage in stages.items() if isinstance(optimizer, kind)), 0)

    def zero_optimization_stage(self) -> int:
        """3, 2 for stages 1 and 2, which lay out their masters alike, or 0."""
        return self._stage


def under_deepspeed() -> bool:
    """Whether accelerate trains with DeepSpeed.

    Raises:
        ValueError: accelerate cuts the parameters in a way whose pieces are not known here.
    """
    kind = AcceleratorState().distributed_type
    if kind != DistributedType.DEEPSPEED and kind not in WHOLE:
        raise ValueError(
            f"SorsaCallback does not work with {kind.value}: the regulariser needs whole factors, or DeepSpeed's fp32 "
            f"masters. Train with DDP or DeepSpeed, or with `sorsa train`"
        )
    return kind == DistributedType.DEEPSPEED


def regulariser_of_parameters(trained: dict[str, nn.Parameter], regularizer: Regularizer) -> ShardedRegularizer:
    """The regulariser on parameters that are whole on every rank.

    Args:
        trained: the trained U and V, by name, from `trained_factors`.

    Raises:
        ValueError: a factor is cut into shards.
    """
    if cut := [name for name, parameter in trained.items() if isinstance(parameter, DTensor)]:
        raise ValueError(
            f"SorsaCallback: {cut[0]} is cut into shards, which it does not support: train with DDP or DeepSpeed, or "
            f"with `sorsa train`"
        )
    fragments = [Fragment(name, p.shape, 0, p.numel(), p, 0) for name, p in trained.items()]
    shapes = {name: p.shape for name, p in trained.items()}
    device = next(iter(trained.values())).device
    return ShardedRegularizer(regularizer, ShardedGrams(Masters(fragments, sharded=False), shapes, device))


def regulariser_of_masters(
    model: nn.Module, optimizer: Any, regularizer: Regularizer, prepare: Callable[[ShardedRegularizer], None]
) -> Any:
    """Add the regulariser's term to DeepSpeed's fp32 masters in each of its steps. A collective call.

    Args:
        optimizer: DeepSpeed's.
        prepare: called before each step of the inner optimizer.

    Returns:
        The handle by which the hook is removed.

    Raises:
        ValueError: the model has no SORSA factors that are trained.
        RuntimeError: DeepSpeed lays its masters out in another way than is known here.
    """
    trained_factors(model)
    view: Any = _EngineView(model, optimizer)
    masters, shapes = locate_masters(view), trained_shapes(view)
    own = ShardedRegularizer(regularizer, ShardedGrams(masters, shapes, view.device))

    def add(inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        prepare(own)
        own.add_to([master for group in inner.param_groups for master in group["params"]])

    return inner_optimizer(view).register_step_pre_hook(add)
