"""Forward and backward of adapted experts against PEFT's LoRA on the same parameters, and the frozen experts alone.

    python benchmarks/experts.py                                                   16 experts in fp32: a CPU
    python benchmarks/experts.py --shape 128 2048 768 --dtype bf16 --tokens 4096   a layer of Qwen3-30B-A3B: a GPU

All three take turns in one process. The frozen weights have the dtype, what is trained is in fp32, and bf16 is computed
under autocast. PEFT forms the product of its factors for all experts, and adds it to the weights, in each pass; ours
goes through the rank. The last line is one JSON object: the ratios' medians over all numbers of tokens, and all
seconds.
"""

import argparse
import copy
import json
import statistics

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.helpers.common import DTYPES, autocast_to, say
from benchmarks.helpers.turns import in_turns, ratio
from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.model.selection import choose
from sorsa_ds.model.targets import insert_sorsa_layers
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.residual_storage import Dense


class Holder(nn.Module):
    """A model that consists of experts alone."""

    def __init__(self, experts: int, hidden: int, inner: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts)
        config._experts_implementation = "grouped_mm"
        with torch.device(device):
            self.experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=hidden**-0.5)

    def forward(self, x, chosen, weights):
        return self.experts(x, chosen, weights)


def main() -> None:
    """Time every number of tokens, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[16, 256, 128], metavar=("EXPERTS", "HIDDEN", "INNER"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = sides(a, device)
    found: dict[str, dict[int, float]] = {"frozen": {}, "lora": {}}
    measured = []
    say(f"{'tokens':>7} {'frozen ms':>10} {'lora ms':>10} {'sorsa ms':>10} | sorsa over frozen, over lora (quartiles)")
    for tokens in a.tokens:
        seconds = measure(a, models, tokens, device)
        measured.append({"tokens": tokens, "seconds": seconds})
        told = []
        for peer, table in found.items():
            table[tokens], low, high = ratio(seconds["sorsa"], seconds[peer])
            told.append(f"{table[tokens]:.3f} ({low:.3f} .. {high:.3f})")
        times = " ".join(f"{1e3 * statistics.median(seconds[side]):>10.3f}" for side in ("frozen", "lora", "sorsa"))
        say(f"{tokens:>7} {times} | " + ", ".join(told))
    result: dict = {"experts": {"shape": a.shape, "dtype": a.dtype, "rank": a.rank, "measured": measured}}
    result |= {f"experts_vs_{peer}": statistics.median(table.values()) for peer, table in found.items()}
    print(json.dumps(result))


def sides(a: argparse.Namespace, device: torch.device) -> dict[str, nn.Module]:
    """The same experts frozen, with PEFT's LoRA, and adapted by SORSA."""
    torch.manual_seed(0)
    frozen = Holder(*a.shape, device, DTYPES[a.dtype])
    lora, sorsa = copy.deepcopy(frozen), copy.deepcopy(frozen)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=a.rank, target_modules=[], target_parameters=parameters), lora)
    config = AdapterConfig(expert_rank=a.rank)
    formats = resolve_precision("fp32" if a.dtype == "fp32" else "mixed", None, device.type)
    insert_sorsa_layers(sorsa, choose(sorsa, config).targets, config, formats, Dense(DTYPES[a.dtype]))
    sorsa.to_empty(device=device)
    for parameter in sorsa.parameters():
        nn.init.normal_(parameter, std=a.shape[1] ** -0.5)
    return {"frozen": frozen, "lora": lora, "sorsa": sorsa}


def measure(
    a: argparse.Namespace, models: dict[str, nn.Module], tokens: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of forward and backward in each round, by side."""
    dtype = DTYPES[a.dtype]
    x = torch.randn(tokens, a.shape[1], device=device, dtype=dtype, requires_grad=True)
    scores, chosen = torch.randn(tokens, a.shape[0], device=device).softmax(-1).topk(a.top_k)
    grad = torch.randn(tokens, a.shape[1], device=device, dtype=dtype)

    def side(model: nn.Module):
        def both() -> None:
            x.grad = None
            model.zero_grad(set_to_none=True)
            with autocast_to(dtype, device):
                y = model(x, chosen, scores.to(dtype))
            y.backward(grad)

        return both

    return in_turns({name: side(model) for name, model in models.items()}, a.rounds)


if __name__ == "__main__":
    main()
