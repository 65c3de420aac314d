"""Where this rank's share of each trained tensor is: in the fp32 masters that the optimizer really updates.

DeepSpeed keeps the masters in a different place on each ZeRO stage. This module finds them once, after the engine is
built, and describes all of them in the same way: as flat fragments of the tensors that the inner torch optimizer holds.
The regulariser, the checkpoints and the exports read and write the trained numbers through these fragments only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor

from sorsa_ds.runtime import collectives


@dataclass(slots=True)
class Fragment:
    """The flat range [start, start + numel) of one trained tensor of the given shape, as this rank's master holds it.

    `master` is the fp32 tensor in the inner optimizer. The range begins at its flat position `offset`.
    """

    name: str
    shape: torch.Size
    start: int
    numel: int
    master: Tensor
    offset: int

    def values(self) -> Tensor:
        """The fragment as a 1-D view into the master: writing to the view changes the master."""
        return self.within(self.master)

    def gradient(self) -> Tensor:
        """The gradient of the fragment, as a 1-D view into the master's gradient."""
        assert self.master.grad is not None, f"{self.name}: no gradient at the optimizer step"
        return self.within(self.master.grad)

    def within(self, tensor: Tensor) -> Tensor:
        """The fragment's place in a tensor that is laid out like the master, such as a moment; a 1-D view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


@dataclass(slots=True)
class Masters:
    """All fragments of this rank. sharded: whether the ranks hold disjoint fragments; else each holds everything."""

    fragments: list[Fragment]
    sharded: bool

    def full(self, name: str, shape: torch.Size, fragment: Fragment | None, device: torch.device) -> Tensor:
        """One whole tensor in fp32, joined from the ranks' fragments. It is valid on rank 0 only. A collective call."""
        whole = torch.zeros(shape, dtype=torch.float32, device=device)
        if fragment is not None and (self.sharded or dist.get_rank() == 0):
            whole.view(-1)[fragment.start : fragment.start + fragment.numel] = fragment.values().to(device)
        if self.sharded and dist.get_world_size() > 1:
            dist.reduce(whole, dst=0)
        return whole


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrappers, whose step updates the masters."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def inner_steps(engine: DeepSpeedEngine) -> int:
    """How often the inner optimizer steps in one step of the engine: on ZeRO-3 once per sub-group."""
    assert len(inner_optimizer(engine).param_groups) == 1, "ZeRO would step once per parameter group"
    return len(engine.optimizer.fp32_partitioned_groups_flat) if engine.zero_optimization_stage() == 3 else 1


def locate_masters(engine: DeepSpeedEngine) -> Masters:
    """Find this rank's fragments of all trainable parameters, in model order, and check them. A collective call.

    Raises:
        RuntimeError: DeepSpeed lays its masters out in another way than is known here.
    """
    trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    stage = engine.zero_optimization_stage()
    fragments: list[Fragment | None]
    if stage == 3:
        fragments = [_stage3(name, p, engine.optimizer) for name, p in trainable.items()]
    elif stage in (1, 2):
        flat_groups = [p for group in inner_optimizer(engine).param_groups for p in group["params"]]
        fragments = [_stage12(name, p, flat_groups) for name, p in trainable.items()]
    else:
        copies = _stage0_copies(engine)
        fragments = [Fragment(name, p.shape, 0, p.numel(), copies[id(p)], 0) for name, p in trainable.items()]
    masters = Masters([f for f in fragments if f is not None and f.numel > 0], sharded=stage > 0)
    _check_masters(masters, trainable, engine.device)
    return masters


def _check_masters(masters: Masters, trainable: dict[str, torch.nn.Parameter], device: torch.device) -> None:
    """Check that fragments equal the model at their places, and together cover every trained number exactly once.

    With an option that makes DeepSpeed lay its masters out differently, scrambled factors would be trained and saved
    without any other sign.

    Raises:
        RuntimeError: the fragments differ from the model or overlap, or a trained number is in none.
    """
    for fragment in masters.fragments:
        parameter = trainable[fragment.name]
        block = getattr(parameter, "ds_tensor", None)
        held = parameter.detach().reshape(-1)[fragment.start :] if block is None else block
        held = held[: fragment.numel].to(fragment.master.device)
        if not torch.equal(fragment.values().to(held.dtype), held):
            raise RuntimeError(f"{fragment.name}: DeepSpeed keeps its fp32 master elsewhere than is known here")
    covered = float(sum(fragment.numel for fragment in masters.fragments))
    if masters.sharded:
        covered = collectives.total(covered, device).item()
    if covered != sum(getattr(p, "ds_numel", p.numel()) for p in trainable.values()):
        raise RuntimeError("DeepSpeed's fp32 masters do not cover the trained parameters exactly once")


def trained_shapes(engine: DeepSpeedEngine) -> dict[str, torch.Size]:
    """The full shape of every trainable parameter by name, also where ZeRO-3 has partitioned it."""
    return {
        n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters() if p.requires_grad
    }


def _stage3(name: str, param: Any, optimizer: Any) -> Fragment:
    """The fragment of a parameter on ZeRO-3, which gives it the attributes `ds_...`.

    ZeRO-3 cuts each parameter into flat blocks of ceil(numel / world) and packs a rank's blocks into sub-groups.
    """
    group, offset, block = optimizer.grad_position[optimizer.get_param_id(param)]
    start = block * param.ds_zero_partition_rank
    numel = max(0, min(block, param.ds_numel - start))  # the last blocks may be padding
    return Fragment(name, param.ds_shape, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _stage12(name: str, param: Any, masters: list[Tensor]) -> Fragment | None:
    """The fragment of a parameter on ZeRO-1 or 2; None where this rank holds nothing of it.

    These stages cut the flattened parameter group. DeepSpeed links each parameter to its piece as `_hp_mapping`.
    """
    link = param._hp_mapping
    if link is None:
        return None
    piece = link.hp_fragment
    for master in masters:
        offset, rest = divmod(piece.data_ptr() - master.data_ptr(), master.element_size())
        if rest == 0 and 0 <= offset <= master.numel() - piece.numel():
            return Fragment(name, param.shape, link.lp_fragment_address.start, piece.numel(), master, offset)
    raise AssertionError(f"{name}: its master is not in the optimizer")


def _stage0_copies(engine: DeepSpeedEngine) -> dict[int, Tensor]:
    """The masters without ZeRO, by id(parameter): fp32 copies of bf16 parameters, or the parameters themselves."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {id(p): copy for low, high in pairs for p, copy in zip(low, high, strict=True)}
    return {id(p): p for group in wrapper.param_groups for p in group["params"]}
