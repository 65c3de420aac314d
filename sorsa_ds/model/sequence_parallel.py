"""Sequence parallelism as DeepSpeed's Ulysses does it: N consecutive ranks compute one micro-batch together.

Each of them computes L / N positions of every sequence. Only attention needs them all: there the ranks exchange
positions for heads, so that each has all L positions of 1 / N of the heads, and back again. The exchange is DeepSpeed's
own `UlyssesSPAttentionHF`, which takes the place of the attention function that the model looks up in transformers'
`ALL_ATTENTION_FUNCTIONS`.

No mask is given to a model: attention is causal over the whole sequence, and padding lies on the right, where no real
token sees it.
Shapes: B sequences, H heads, L positions of all ranks together, D numbers of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sorsa_ds.config.batch_size import data_ranks, shard_length
from sorsa_ds.model.packed_attention import balances_by_mask, why_not_packed
from sorsa_ds.model.rotary import steady_length
from sorsa_ds.runtime import collectives

_FULL, _SLIDING = "full_attention", "sliding_attention"


class SequenceParallel:
    """What N ranks need to compute sequences together; with N = 1 every rank computes its own, and nothing changes.

    size: N, the number of ranks that compute a sequence together.
    rank: the number of this process among the N, from 0.
    data_rank: the number of the group of N that this process belongs to, from 0.
    data_ranks: the number of groups; each group takes micro-batches of its own.
    """

    def __init__(self, size: int = 1, timeout: timedelta = collectives.TIMEOUT):
        """Make the groups of N consecutive ranks. A collective call.

        Args:
            size: N, which divides the number of ranks.
            timeout: how long an exchange may take.
        """
        self.size = size
        self.data_ranks = data_ranks(collectives.world_size(), size)
        self.data_rank, self.rank = divmod(collectives.rank(), size)
        self._group = _consecutive(size, timeout) if size > 1 else None
        self._exchanges: dict[tuple[int, ...], nn.Module] = {}
        self._whole = False
        self._hook: RemovableHandle | None = None
        self._implementation = ""

    def attach(self, model: PreTrainedModel) -> None:
        """Let a model take shards of sequences from now on.

        Every model of this process that uses the same attention function does, until `detach` is called.

        Args:
            model: one that `check_model` lets pass.
        """
        if self.size == 1:
            return
        self._implementation = model.config._attn_implementation
        self._core = ALL_ATTENTION_FUNCTIONS[self._implementation]
        ALL_ATTENTION_FUNCTIONS[self._implementation] = self._attend
        self._hook = model.register_forward_pre_hook(self._place, with_kwargs=True)

    def detach(self) -> None:
        """Undo what `attach` has done."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del ALL_ATTENTION_FUNCTIONS[self._implementation]
            if ALL_ATTENTION_FUNCTIONS.get(self._implementation) is not self._core:  # it was not transformers' own
                ALL_ATTENTION_FUNCTIONS[self._implementation] = self._core

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Context in which every rank computes whole sequences by itself."""
        self._whole = True
        try:
            yield
        finally:
            self._whole = False

    def _place(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a model with the positions of this rank's shard and without a mask, as a pre-hook."""
        if self._whole:
            return args, kwargs
        return args, kwargs | {"attention_mask": None, "position_ids": self._positions(kwargs["input_ids"])}

    def _positions(self, like: Tensor) -> Tensor:
        """Where a shard's tokens are in their sequences: int64, as many rows and columns as `like`."""
        sequences, length = like.shape
        first = self.rank * length
        return torch.arange(first, first + length, device=like.device).expand(sequences, -1).contiguous()

    def _attend(
        self,
        module: nn.Module,
        query_BHLD: Tensor,
        key_BHLD: Tensor,
        value_BHLD: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the model calls in place of the attention function; shapes are those of a shard, with all heads.

        Raises:
            ValueError: the layer asks for something that is not the same in shards.
        """
        if self._whole:
            return self._core(module, query_BHLD, key_BHLD, value_BHLD, attention_mask, *args, **kwargs)
        sequences, heads, length, width = query_BHLD.shape
        self._check_call(module, key_BHLD, value_BHLD, length * self.size, kwargs)
        shape = (sequences, heads, key_BHLD.shape[1], width)
        exchange = self._exchanges.get(shape)
        if exchange is None:
            exchange = self._exchanges[shape] = self._exchange(*shape)
        kwargs["position_ids"] = self._positions(query_BHLD[:, 0, :, 0])
        # DeepSpeed changes it where it repeats keys and values, and would leave it so.
        groups = getattr(module, "num_key_value_groups", None)
        try:
            return exchange(module, query_BHLD, key_BHLD, value_BHLD, None, *args, **kwargs)
        finally:
            if groups is not None:
                module.num_key_value_groups = groups

    def _exchange(self, sequences: int, heads: int, key_value_heads: int, width: int) -> nn.Module:
        """DeepSpeed's attention for inputs of this shape.

        It is made here and not by its `register_with_transformers`, because that takes one micro-batch size for all
        calls and one number of heads for all layers, and does not give the attention function back.
        """
        # Imported where it is needed: it takes part of a second, and few runs need it.
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        made = UlyssesSPAttentionHF(
            attn=self._core,
            batch_size=sequences,
            attn_head_count=heads,
            attn_head_size=width,
            kv_head_count=key_value_heads,
            num_hidden_layers=1,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        made.core_attn_implementation = self._implementation
        return made

    def _check_call(
        self, module: nn.Module, key_BHLD: Tensor, value_BHLD: Tensor, length: int, given: dict[str, Any]
    ) -> None:
        """Stop where a layer's attention would not be the same in shards. All ranks of a group stop alike.

        Raises:
            ValueError: naming the layer's class and what it asks for.
        """
        window, flash = given.get("sliding_window"), "flash" in self._implementation
        why = None
        if key_BHLD.shape != value_BHLD.shape:
            why = "has keys and values of different widths"
        elif given.get("s_aux") is not None:
            why = "has a sink for each head"
        elif given.get("position_bias") is not None:
            why = "adds a bias by position"
        elif window is not None and window < length and not flash:
            why = f"sees {window} tokens back, fewer than the sequence's {length}, which takes a mask"
        if why is not None:
            raise ValueError(f"train.sequence_parallel={self.size}: {type(module).__name__} {why}; set it to 1")


def check_model(model: PreTrainedModel, size: int, max_length: int) -> None:
    """Stop where a model cannot be computed in shards of sequences.

    Args:
        model: the model as transformers builds it; its parameters may be on the meta device.
        size: `train.sequence_parallel`.
        max_length: `data.max_length`.

    Raises:
        ValueError: naming the model's class, why, and the way out.
    """
    if size > 1 and (why := _why_not(model, size, max_length)) is not None:
        raise ValueError(f"train.sequence_parallel={size}: {type(model).__name__} {why}; set it to 1")


def _why_not(model: PreTrainedModel, size: int, max_length: int) -> str | None:
    config = model.config.get_text_config()
    if (why := why_not_packed(model)) is not None:
        return why
    if not getattr(model, "_supports_attention_backend", False):
        return "does not call its attention through transformers' ALL_ATTENTION_FUNCTIONS"
    implementation = config._attn_implementation
    if implementation != "sdpa" and "flash" not in implementation:
        return (
            f"computes attention with loading.attn_implementation={implementation}, which needs a mask of all positions"
        )
    if balances_by_mask(model):
        return (
            "adds a loss of its router (output_router_logits in its config.json), which is a mean over the positions "
            "that are computed together"
        )
    steady = steady_length(model.config)
    if steady is not None and max_length > steady:
        return (
            f"chooses its rotary frequencies by the longest position that it is given, and beyond {steady} of them "
            f"shards would have different ones (data.max_length={max_length})"
        )
    heads = config.num_attention_heads
    if heads % size:
        return f"has {heads} attention heads, which {size} ranks cannot share equally"
    key_value = getattr(config, "num_key_value_heads", None) or heads
    if key_value % size and size % key_value:
        return f"has {key_value} heads of keys and values, and neither of {size} and {key_value} divides the other"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or [_FULL if window is None else _SLIDING])
    if others := sorted(kinds - {_FULL, _SLIDING}):
        return f"has layers whose attention needs a mask ({', '.join(others)})"
    padded = shard_length(max_length, size) * size
    if _SLIDING in kinds and window is not None and window < padded and "flash" not in implementation:
        return (
            f"has layers that see {window} tokens back, fewer than data.max_length={max_length} asks for, and "
            f"{implementation} attention needs a mask for that"
        )
    return None


def _consecutive(size: int, timeout: timedelta) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks that this rank belongs to. A collective call of all ranks."""
    mine = None
    for first in range(0, collectives.world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks, timeout=timeout)
        if collectives.rank() in ranks:
            mine = group
    assert mine is not None, "the size divides the number of ranks"
    return mine
