"""A linear of a model that PEFT has adapted to SORSA: the base layer as it is, plus the change of its weight.

    y = base(x) + x (W - W_0)^T,   W - W_0 = scale * (U diag(s) V^T - U_0 diag(s_0) V_0^T)

That is SORSA's layer (eq. 8) with its residual W_r = W_0 - scale * U_0 diag(s_0) V_0^T written out: W_r is stored
nowhere. So a base layer may be packed into 4 bits and is not packed anew, an adapter that is disabled leaves the base
model bit for bit, and a layer may have several adapters. It costs a second product of rank R, which is frozen.

Shapes: M outputs, N inputs, R rank.
"""

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.model.input_directions import InputDirections
from sorsa_ds.peft.config import SorsaConfig
from sorsa_ds.peft.kept_weight import KeptNumbers, KeptPacked, can_be_compared
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.sorsa.change import apply_change, dense_change
from sorsa_ds.sorsa.decompose import Factors, decompose, decompose_within

LEAVES = ("U", "s", "V")
INITIAL_HOLDER, EARLIER_HOLDER = "sorsa_initial", "initial_factors"
"""Where a layer has U_0, s_0 and V_0, and what that was called in files of earlier versions.

The name begins as all of the method's do: TRL knows an adapter's parameters by that when it sends the others to vLLM.
"""


class FactorTensors(nn.Module):
    """The parameters U (M, R), s (R,) and V (N, R) of one adapter, trained or initial.

    Args:
        shapes: the shapes of U, s and V.
        trained: whether they need a gradient.

    Attributes:
        filled: whether they have values; False until `fill`, or until a state dict has brought them.
    """

    def __init__(self, shapes: tuple[tuple[int, ...], ...], trained: bool):
        super().__init__()
        self.filled = False
        for leaf, shape in zip(LEAVES, shapes, strict=True):
            self.register_parameter(leaf, nn.Parameter(torch.empty(shape), requires_grad=trained))

    @torch.no_grad()
    def fill(self, factors: Factors) -> None:
        """Take the numbers and the device of some factors."""
        for leaf, values in zip(LEAVES, factors.tensors(), strict=True):
            parameter = self.get_parameter(leaf)
            parameter.data = values.clone() if values.dtype == torch.float32 else values.float()
        self.filled = True

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no memory."""
        return self.get_parameter("U").is_meta

    def factors(self) -> Factors:
        """The parameters, as the functions of `sorsa_ds.sorsa` take them."""
        return Factors(*(getattr(self, leaf) for leaf in LEAVES))  # FSDP puts tensors in the parameters' place

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.filled = self.filled or all(f"{prefix}{leaf}" in state_dict for leaf in LEAVES)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SorsaLayer(BaseTunerLayer):
    """What PEFT's programs ask of an adapted layer. `SorsaLinear` is the layer itself.

    Attributes:
        sorsa_factors: U, s and V of each adapter, trained.
        sorsa_initial: U_0, s_0 and V_0 of each adapter, frozen and saved with it: an adapter's file is enough to
            compute the same on another machine, whatever its decomposition would give.
        sorsa_scale, sorsa_dropout, sorsa_rank: each adapter's factor on U diag(s) V^T, dropout probability and rank.
        sorsa_kept: what brings the base weight back bit for bit, for each merged adapter.
    """

    adapter_layer_names: tuple[str, ...] = ("sorsa_factors",)
    other_param_names: tuple[str, ...] = (
        INITIAL_HOLDER, "sorsa_scale", "sorsa_dropout", "sorsa_rank", "sorsa_kept",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, **options: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=options.get("get_apply_tensor_subclass")
        )
        self.sorsa_factors, self.sorsa_initial = nn.ModuleDict(), nn.ModuleDict()
        self.sorsa_scale: dict[str, float] = {}
        self.sorsa_dropout: dict[str, float] = {}
        self.sorsa_rank: dict[str, int] = {}
        self.sorsa_kept: dict[str, KeptNumbers | KeptPacked] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer())}")
        self.in_features, self.out_features = int(in_features), int(out_features)

    def update_layer(self, adapter_name: str, config: SorsaConfig, rank: int, name: str) -> None:
        """Add an adapter, which begins as singular triplets of the base weight.

        Args:
            rank: R.
            name: the layer's name in the model, which seeds the decomposition as it does in the trainer.

        Raises:
            ValueError: the rank is not in 1 .. min(M, N), or the weight cannot be decomposed.
            TypeError: the base layer's quantisation cannot be undone.
        """
        if not 1 <= rank <= min(self.in_features, self.out_features):
            raise ValueError(
                f"{name}: `r` ({rank}) must be in 1 .. {min(self.in_features, self.out_features)} = min(out, in) of "
                f"this linear: give it a smaller rank by `rank_pattern`, or leave it out by `exclude_modules`"
            )
        if self.merged:  # PEFT takes the others out when the adapter is set, which is after the decomposition
            warnings.warn("Adapter cannot be added when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge()
        shapes = (self.out_features, rank), (rank,), (self.in_features, rank)
        now, begun = FactorTensors(shapes, trained=True), FactorTensors(shapes, trained=False)
        self.sorsa_factors[adapter_name], self.sorsa_initial[adapter_name] = now, begun
        self.sorsa_scale[adapter_name] = config.scale(rank)
        self.sorsa_dropout[adapter_name] = config.sorsa_dropout
        self.sorsa_rank[adapter_name] = rank
        if not (config.factors_follow or now.is_meta):
            found = self._decomposed(config, rank, name)
            begun.fill(found)
            now.fill(found if config.init_weights else _random_like(found))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _decomposed(self, config: SorsaConfig, rank: int, name: str) -> Factors:
        """The singular triplets of W that are trained, as the trainer finds them."""
        with gather_params_ctx(self.get_base_layer().parameters(), modifier_rank=None), full_fp32_products():
            weight = self.get_base_weight()
            weight_MN = weight.t() if self.transposed else weight
            if config.directions is not None:
                directions_RN = InputDirections(config.directions).of(name, weight_MN, rank)
                return decompose_within(weight_MN, directions_RN, name)
            first = config.decomposition().first_triplet(self.out_features, self.in_features, rank)
            return decompose(weight_MN, rank, name, config.svd, config.svd_tolerance, config.svd_max_iterations, first)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device. It stays in its dtype, unlike with PEFT's other methods.

        The factors carry the largest singular values: rounding them to bf16 on the way to fp32 would move the layer,
        and they would not be orthonormal.
        """
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for tensors in (self.sorsa_factors, self.sorsa_initial):
            if device is not None and adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name].to(device=device)

    def _pair(self, adapter_name: str) -> tuple[Factors, Factors]:
        """An adapter's factors now and at the beginning.

        Raises:
            ValueError: the adapter's factors were to be loaded, and never were.
        """
        now: Any = self.sorsa_factors[adapter_name]
        begun: Any = self.sorsa_initial[adapter_name]
        if not (now.filled and begun.filled):
            raise ValueError(
                f"the factors of the adapter {adapter_name!r} were never loaded: its configuration was read by "
                f"SorsaConfig.from_pretrained, or its layers were made with low_cpu_mem_usage, for a saved adapter "
                f"whose file must hold both `sorsa_factors` and `sorsa_initial`. A configuration for a new adapter "
                f"is read by PeftConfig.from_pretrained"
            )
        return now.factors(), begun.factors()

    def get_base_weight(self) -> Tensor:
        """The weight of the base layer, dequantised where it is packed.

        On CPUs with bf16 instructions, bitsandbytes lays 4-bit weights out anew in their first forward pass, in a way
        that its own functions that dequantise take for another weight. It is laid out as before, with scales in bf16.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        state = getattr(weight, "quant_state", None)
        if weight is not None and getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse  # only where it is in use

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, cast(Any, state))
        return super().get_base_weight()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the weight, in the base weight's layout, in fp32 or wider."""
        with full_fp32_products():
            change_MN = dense_change(*self._pair(adapter_name), self.sorsa_scale[adapter_name])
        return change_MN.t() if self.transposed else change_MN

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can take it: the change is a matrix that is added."""
        return True


class SorsaLinear(nn.Module, SorsaLayer):
    """An adapted linear of PEFT: `torch.nn.Linear`, transformers' Conv1D, or what PEFT can quantise of them."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SorsaConfig, rank: int, name: str, **options):
        super().__init__()
        SorsaLayer.__init__(self, base_layer, **options)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, rank, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., N) to y (..., M), in the dtype of what the base layer returns."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.sorsa_factors:
                now, begun = self._pair(name)
                dropout = self.sorsa_dropout[name] if self.training else 0.0
                cast = self._cast_input_dtype(x, now.U.dtype)
                result = result + apply_change(cast, now, begun, self.sorsa_scale[name], dropout)
        return result.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change of some adapters to the base weight, which is packed again where it was packed.

        Args:
            safe_merge: look at the merged weight before the base weight is replaced.
            adapter_names: None: all active adapters.

        Raises:
            ValueError: `safe_merge`, and the merged weight is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.sorsa_factors:
                change = self.get_delta_weight(name)
                merged = self._shifted(self.get_base_weight(), change)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                self._set_merged(name, merged, change)
                self.merged_adapters.append(name)

    def _set_merged(self, name: str, merged: Tensor, change: Tensor) -> None:
        """Replace the base weight by the merged one, and keep what is needed to bring it back."""
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            packed = KeptPacked.of(self.base_layer, base)
            self.set_base_weight(merged)
            packed.after_merge(self.get_base_layer())
            self.sorsa_kept[name] = packed
            return
        weight = self.get_base_weight()
        if can_be_compared(weight):
            self.sorsa_kept[name] = KeptNumbers.of(weight, self._shifted(merged, -change))
        self.set_base_weight(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the change of all merged adapters from the base weight again: it is then what it was, bit for bit.

        Where the weight was moved, cast or replaced while an adapter was merged, it is so up to the rounding of its
        dtype, or of its packing.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            kept = self.sorsa_kept.pop(name, None)
            if isinstance(kept, KeptPacked) and kept.brings_back(self.get_base_layer()):
                self.base_layer = kept.bring_back()
            elif name in self.sorsa_factors:
                back = self._shifted(self.get_base_weight(), -self.get_delta_weight(name))
                self.set_base_weight(kept.correct(back) if isinstance(kept, KeptNumbers) else back)
            else:  # it was deleted while it was merged, and stays in the weight: what came before it is not known
                self.sorsa_kept.clear()

    @staticmethod
    def _shifted(weight: Tensor, change: Tensor) -> Tensor:
        """A weight plus a change, rounded once to the weight's dtype."""
        return (weight.to(change.dtype) + change.to(weight.device)).to(weight.dtype)

    def extra_repr(self) -> str:
        """The quantisation of the base layer, as `print(model)` shows it."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sorsa." + super().__repr__()


def _random_like(factors: Factors) -> Factors:
    """Factors of the same shapes that have nothing to do with the weight, for tests of PEFT that need a change."""
    scales = (len(factors.U) ** -0.5, 1.0, len(factors.V) ** -0.5)
    return Factors(*(scale * torch.randn_like(one) for one, scale in zip(factors.tensors(), scales, strict=True)))
