"""Where PEFT keeps the LoRA of each adapted weight, and whether it would find it again.

That of a linear lies beside it, that of experts around their module (`sorsa_ds.methods.peft_experts`). Both are asked
of PEFT itself, on a model without memory.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.methods.peft_experts import bare, is_turned, together
from sorsa_ds.model.peft_names import ONLY_ADAPTER, PREFIX
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.targets import Target
from sorsa_ds.run.peft_files.low_rank import LowRank

if TYPE_CHECKING:
    from peft import LoraConfig

MERGED = "--format merged writes the trained model itself"


@dataclass(frozen=True, slots=True)
class Place:
    """Where PEFT keeps the LoRA of a target.

    layer: name of PEFT's layer, as the adapter's file has it. turned: whether PEFT takes the matrices for (N, M).
    """

    layer: str
    target: Target
    turned: bool = False

    def specs(self, rank: int) -> list[TensorSpec]:
        """A and B as the file has them, fp32."""
        ends = self.target.in_features, self.target.out_features
        n, m = reversed(ends) if self.turned else ends
        rows = self.target.matrices * rank
        return [TensorSpec(f"{self.layer}.lora_{leaf}.weight", torch.Size(shape), torch.float32)
                for leaf, shape in (("A", (rows, n)), ("B", (m, rows)))]  # fmt: skip

    def laid_out(self, found: LowRank) -> list[Tensor]:
        """A and B as the file has them."""
        A, B = (found.B.mT, found.A.mT) if self.turned else (found.A, found.B)
        return [tensor.contiguous() for tensor in together(A, B, self.target)]


def find_places(
    model: PreTrainedModel, config: "LoraConfig", targets: Sequence[Target], ranks: Mapping[str, int]
) -> dict[str, Place]:
    """Where PEFT keeps the LoRA of each target, by each of the target's names.

    Args:
        model: the base model without memory; it stays as it is.
        config: the configuration that will be written.
        ranks: the rank of each target, by each of the target's names.

    Raises:
        ValueError: PEFT cannot carry a target; the message says why.
    """
    for target in targets:
        if target.experts and model.get_parameter(target.name).dim() != 3:
            raise ValueError(
                f"{target.name} holds the weights of {target.experts} experts in two dimensions, which PEFT takes for "
                f"one matrix; {MERGED}"
            )
    from peft import get_peft_model, set_peft_model_state_dict

    model, config = copy.deepcopy(model), copy.deepcopy(config)
    config.modules_to_save = None  # they are no LoRA, and have their names from elsewhere
    try:
        with init_empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever went wrong shows below
            wrapped = get_peft_model(model, config, ONLY_ADAPTER)
            places = _places(wrapped, targets)
            specs = [spec for name, place in places.items() for spec in place.specs(ranks[name])]
            empty = {spec.name: torch.empty(spec.shape, device="meta") for spec in specs}
            result: Any = set_peft_model_state_dict(wrapped, empty, ONLY_ADAPTER, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"PEFT cannot hold this LoRA: {error}; {MERGED}") from error
    lost = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if lost:
        raise ValueError(f"PEFT would not find {lost[0]} again, nor {len(lost) - 1} other tensors of it; {MERGED}")
    return places


def _places(wrapped: torch.nn.Module, targets: Sequence[Target]) -> dict[str, Place]:
    """Where a model that PEFT has wrapped keeps the LoRA of each target, by each of its names.

    Raises:
        ValueError: PEFT computes something else with one of them.
    """
    from peft.tuners.lora import ParamWrapper

    wrappers = {
        f"{bare(name).removeprefix(PREFIX)}.{module.parameter_name}": (name, module.get_base_layer())
        for name, module in wrapped.named_modules()
        if isinstance(module, ParamWrapper)
    }
    places: dict[str, Place] = {}
    for target in targets:
        if target.weight not in wrappers:
            places |= {place: Place(f"{PREFIX}{place}", target) for place in target.places}
            continue
        layer, module = wrappers[target.weight]
        if target.experts == 1 and getattr(module, "is_transposed", False):
            raise ValueError(f"it takes the single expert of {target.name} for the transposed matrix")
        places[target.name] = Place(layer, target, is_turned(module, target))
    return places
