"""The model that PEFT makes of a base model and a SorsaConfig."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.peft.config import SorsaConfig
from sorsa_ds.peft.layer import EARLIER_HOLDER, INITIAL_HOLDER, LEAVES, SorsaLayer, SorsaLinear


def present_name(key: str) -> str:
    """The name that a tensor of a saved adapter has now; an earlier version called the initial factors otherwise."""
    layer, _, leaf = key.rpartition(".")
    if leaf in LEAVES and layer.endswith(f".{EARLIER_HOLDER}"):
        return f"{layer.removesuffix(EARLIER_HOLDER)}{INITIAL_HOLDER}.{leaf}"
    return key


class SorsaModel(BaseTuner):
    """A model whose linears are adapted to SORSA. `peft.get_peft_model` makes it and wraps it.

    Args:
        model: the base model.
        config: the configuration.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: make the factors on the meta device, for a saved adapter that is loaded next.
    """

    prefix: str = "sorsa_"
    tuner_layer_cls = SorsaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """Adapt the linears. A configuration that was read for a saved adapter has then served that purpose."""
        super().inject_adapter(model, adapter_name, *args, **options)
        config = self.peft_config[adapter_name]
        if isinstance(config, SorsaConfig):
            config.factors_follow = False

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Adapt one linear, or add an adapter to one that is adapted.

        Raises:
            TypeError: `target` is no linear that SORSA can adapt.
            ValueError: see `SorsaLayer.update_layer`.
        """
        rank = peft_config.rank_pattern.get(get_pattern_key(list(peft_config.rank_pattern), current_key), peft_config.r)
        if isinstance(target, SorsaLayer):
            target.update_layer(adapter_name, peft_config, rank, current_key)
            return
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(self))
        if not isinstance(target, nn.Linear | Conv1D) and (backend is None or backend.layer_type != "linear"):
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` and "
                f"`transformers.pytorch_utils.Conv1D` (optionally quantized) are supported."
            )
        layer = SorsaLinear(target, adapter_name, peft_config, rank, current_key, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Read the names of a saved adapter, also those of earlier versions."""
        named = {present_name(key): value for key, value in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **options: Any) -> Iterator[None]:
        """Refuse what PEFT would leave out without a word.

        Raises:
            ValueError: each row of a batch is to have an adapter of its own.
        """
        if options.get("adapter_names") is not None:
            raise ValueError("SORSA has no batches of mixed adapters (adapter_names): choose one by set_adapter")
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the factors in fp32, or round them to the base layer's dtype where PEFT is told not to widen them."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, SorsaLayer):
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                for tensors in (layer.sorsa_factors, layer.sorsa_initial):
                    if adapter_name in tensors and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                        tensors[adapter_name].to(dtype)
