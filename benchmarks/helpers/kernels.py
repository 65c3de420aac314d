"""Kernels counted exactly where PyTorch dispatches its operators: on a CPU as on a GPU."""

from collections import Counter

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.helpers.common import TINY_LLAMA
from benchmarks.helpers.layer_forms import Side, kept_bytes
from benchmarks.helpers.peers import layers
from benchmarks.helpers.sides import replace
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Dense
from sorsa_ds.sorsa.sides import keep_sides

_NAMES = """
    _local_scalar_dense _nested_tensor_size _reshape_alias _unsafe_view alias as_strided detach diagonal empty
    empty_like empty_strided expand lift_fresh new_empty new_empty_strided permute select slice split split_with_sizes
    squeeze t transpose unbind unsqueeze view view_as_real
"""
WITHOUT_KERNEL = frozenset(_NAMES.split())
"""Operators that make a view, allocate, or read a number: nothing is launched for them."""

TOKENS, RANK = 32, 8
"""Sizes of what is counted. No count depends on them."""


class Kernels(TorchDispatchMode):
    """Context that counts by name the operators inside it, backward passes included, that launch a kernel.

    An operator of a library, such as attention, counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in WITHOUT_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def linear_kernels(peer: str, kept: bool = True) -> int:
    """Kernels of an adapted linear in mixed precision: the forward and backward pass of a later micro-batch of a step.

    Gradients are added to those of the micro-batch before.

    Args:
        peer: `sorsa`, or another key of `peers.layers`.
        kept: whether the sides are kept for the step, as they are but on ZeRO-3.
    """
    m, n = 64, 48
    layer = layers(m, n, RANK, torch.bfloat16, torch.device("cpu"))[peer]
    x = torch.randn(TOKENS, n, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(TOKENS, m, dtype=torch.bfloat16)

    def micro_batch() -> None:
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.backward(gradient)

    return _of_the_second(micro_batch, layer, kept)


def block_kernels(peer: str, kept: bool = True) -> int:
    """Kernels of one block of a Llama with all of its linears adapted: of what three blocks take more than two."""
    few, many = (_model_kernels(peer, blocks, kept) for blocks in (2, 3))
    return many - few


def _model_kernels(peer: str, blocks: int, kept: bool) -> int:
    """Kernels of a small Llama in mixed precision: the forward and backward pass of a later micro-batch of a step."""
    model = small_llama(blocks, lora=peer == "lora")
    ids = torch.randint(0, 128, (2, 16))

    def micro_batch() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            total = model(input_ids=ids, use_cache=False).logits.float().sum()
        total.backward()

    return _of_the_second(micro_batch, model, kept)


def small_llama(blocks: int, lora: bool = False) -> nn.Module:
    """A small frozen Llama in bf16, with SORSA in fp32 in the place of its linears, or PEFT's LoRA around them."""
    shape = LlamaConfig(**TINY_LLAMA | {"num_hidden_layers": blocks, "num_key_value_heads": 2})
    model: nn.Module = LlamaForCausalLM(shape).bfloat16().requires_grad_(False)
    if lora:
        return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = SorsaLinear(linear.in_features, linear.out_features, RANK, storage=Dense(torch.bfloat16))
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.02)
            replace(model, name, layer)
    return model


def _of_the_second(micro_batch, model: nn.Module, kept: bool) -> int:
    """Kernels of a micro-batch that follows another one in the same step."""
    adapted = [module for module in model.modules() if isinstance(module, SorsaLinear) and kept]
    with keep_sides(adapted, torch.bfloat16):
        micro_batch()
        with Kernels() as counted:
            micro_batch()
    return counted.counts.total()


def kept_ratio() -> float:
    """Bytes of activations that an adapted linear keeps for backward, over those of x and of the thin product."""
    m, n, dtype = 64, 48, torch.bfloat16
    layer = layers(m, n, RANK, dtype, torch.device("cpu"))["sorsa"]
    x = torch.randn(TOKENS, n, dtype=dtype, requires_grad=True)
    kept = kept_bytes(Side(layer, [], list(layer.parameters())), x, dtype)
    return kept / (dtype.itemsize * TOKENS * (n + RANK))
