"""torch.compile for the blocks of a model (`train.compile`): tried before the first step, and left where it fails.

Between its large products a block has many small kernels: norms, rotations, activations, sums. A compiler makes a few
of them. Each block is compiled by itself, so that all blocks of a kind share one compilation, and so that what hooks
and checkpointing do around a block stays as it is. Lengths are symbols of that compilation, not constants.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError
from transformers.modeling_layers import GradientCheckpointingLayer

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan, aligned
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note, say
from sorsa_ds.train.loss import LossOptions, training_losses
from sorsa_ds.train.micro_batch import MicroBatch

_GRAPHS = 64
"""Compilations of one piece of code, for layers that differ; PyTorch's own limit, 8, is less than some models need."""

_GAPS_FP32, _GAPS_NARROW = (1e-5, 1e-3), (1e-2, 5e-2)
"""By how much the loss, and the gradient as a vector, may differ relatively in compiled blocks: by rounding."""

_COMPILER_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit, InductorError)


def compile_blocks(
    engine: SorsaEngine, config: RunConfig, batches: BatchPlan | StreamBatches, step: int, options: LossOptions
) -> int | None:
    """Compile the blocks of a run's model where `train.compile` asks for it and where it works. A collective call.

    One micro-batch is computed with and without the compiler, and losses and gradients are compared. Nothing that the
    run computes later depends on this trial. The result, or why nothing is compiled, is said.

    Args:
        batches: the model is tried on this rank's first micro-batch of the next step.
        step: the number of finished steps.
        options: how the run computes losses.

    Returns:
        Up to which length micro-batches are to be aligned; None where nothing is compiled.
    """
    if config.train.compile == "off" or step >= batches.steps:
        return None
    blocks = [one for one in engine.module.modules() if isinstance(one, GradientCheckpointingLayer)]
    kind = " and ".join(sorted({type(one).__name__ for one in blocks}))
    why = _unfit(engine, config, blocks)
    if why is None:
        say(f"Compiling {len(blocks)} blocks ({kind}); this may take minutes ...")
        batch = aligned(batches.micro_batches(step)[0], batches.pad_token_id, config.data.max_length)
        probe = MicroBatch.of(batch).to(engine.device)
        why, told = _try_compiled(engine, blocks, probe, options, config.train.precision)
    if why is not None:
        say(f"Blocks are not compiled: {why} (train.compile).")
        return None
    say(f"Blocks are compiled: {told} (train.compile).")
    return config.data.max_length


def _unfit(engine: SorsaEngine, config: RunConfig, blocks: Sequence[nn.Module]) -> str | None:
    """Why a run's blocks are not tried at all, in words."""
    if engine.zero_optimization_stage() == 3:
        return "under ZeRO-3 the parameters of a block come and go inside of it"
    if config.train.sequence_parallel > 1:
        return "with train.sequence_parallel the attention of a block is a collective call"
    if not blocks:
        return f"{type(engine.module).__name__} has no blocks of a kind that transformers knows"
    return None


def _try_compiled(
    engine: SorsaEngine, blocks: Sequence[nn.Module], probe: MicroBatch, options: LossOptions, precision: str
) -> tuple[str | None, str]:
    """Compile blocks and compare them with what they were. A collective call; on all ranks with the same outcome.

    Returns:
        (why they are as they were, None where they are compiled; how far losses and gradients differ, in words).
    """
    compiled = _CompiledBlocks(engine.module, blocks)
    gaps = [math.inf, math.inf]
    try:
        wanted, gradients = _computed(engine, probe, options)
        wanted_gradients = [one.cpu() for one in gradients]
        compiled.active = True
        loss, gradients = _computed(engine, probe, options)
        gaps = [abs(loss - wanted) / abs(wanted) if wanted else abs(loss), _distance(gradients, wanted_gradients)]
        del gradients
    except Exception as error:  # any: compilers fail in many ways, and the trial may need more memory than a step
        compiled.give_up(_first_line(error))
    why = next(filter(None, collectives.gather_lists([compiled.failure])), "")
    loss_gap, gradient_gap = (max(collectives.gather_lists([gap if gap == gap else math.inf])) for gap in gaps)
    # A GPU that rounds fp32's products to TF32 makes more of every difference.
    exact = precision == "fp32" and torch.get_float32_matmul_precision() == "highest"
    most = _GAPS_FP32 if exact else _GAPS_NARROW
    told = f"on one micro-batch the loss differs by {loss_gap:.1e} and its gradient by {gradient_gap:.1e}, relatively"
    if not why and loss_gap <= most[0] and gradient_gap <= most[1]:
        return None, told
    compiled.give_up(why or told)
    return why or told, told


class _CompiledBlocks:
    """Blocks that are compiled until the compiler fails in one of them; from the next micro-batch on none is.

    Within a micro-batch every block stays with what it has done, since its recomputation in the backward pass must
    keep the same tensors as its forward pass.

    active: whether they are compiled as long as that works, from the next micro-batch on.
    failure: why they are not compiled any more; empty while they are.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        self.active, self.failure = False, ""
        self._eager = True
        torch._dynamo.config.recompile_limit = _GRAPHS
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # the alternative is to go on without a word
        # The tables of 4-bit codes are made once by functions with a cache, and never change.
        warnings.filterwarnings("ignore", message=r"Dynamo detected a call to a `functools\.lru_cache`")
        torch._functorch.config.force_non_lazy_backward_lowering = True  # later it would fail in the backward pass
        model.register_forward_pre_hook(self._begin)
        for block in blocks:
            block.forward = self._guarded(block.forward)

    def give_up(self, why: str) -> None:
        """From the next forward pass of the model on run all blocks as they are."""
        self.failure = self.failure or why

    def _begin(self, model: nn.Module, arguments: tuple) -> None:
        self._eager = not self.active or bool(self.failure)

    def _guarded(self, forward: Callable) -> Callable:
        """A block's forward pass, compiled. With the same random numbers as without, so that runs can be repeated."""
        compiled = torch.compile(forward, dynamic=True, options={"fallback_random": True})

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._eager:
                return forward(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except _COMPILER_ERRORS as error:
                if not self.failure:
                    self.give_up(_first_line(error))
                    note(f"the compiler fails in a block ({self.failure}); blocks go on without it (train.compile)")
                return forward(*args, **kwargs)

        return guarded


def _computed(engine: SorsaEngine, probe: MicroBatch, options: LossOptions) -> tuple[float, Sequence[Tensor]]:
    """The loss of a micro-batch and its gradients; the model and the random numbers stay untouched.

    The engine is passed by: its hooks would take the gradients for those of a step.
    """
    trained = [one for one in engine.module.parameters() if one.requires_grad]
    devices = [engine.device] if engine.device.type == "cuda" else []
    was_training, dtype = engine.training, engine.product_dtype
    engine.train()
    try:
        products = torch.autocast(engine.device.type, dtype, enabled=dtype is not None)
        with torch.random.fork_rng(devices), products, engine.kept_sides():
            loss, balance = training_losses(engine.module, probe, options)
            loss = loss if balance is None else loss + balance
            gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    finally:
        engine.train(was_training)
    return loss.item(), gradients


def _distance(gradients: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far gradients are from others, relatively, as one vector."""
    pairs = zip(gradients, wanted, strict=True)
    apart = math.hypot(*((one.double() - other.to(one.device).double()).norm().item() for one, other in pairs))
    return apart / max(math.hypot(*(one.double().norm().item() for one in wanted)), torch.finfo(torch.float32).tiny)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
