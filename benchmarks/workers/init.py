"""The sides that benchmarks/init.py compares, each in fresh processes.

Rank 0 prints one JSON object last.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.helpers.common import Peak, run_side, write_llama
from sorsa_ds.config.schema import AdapterConfig, LoadingConfig, SorsaConfig
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.model.load import load_adapted_model
from sorsa_ds.model.pretrained import PretrainedWeights
from sorsa_ds.model.schedule import Item, schedule
from sorsa_ds.model.sharding import Whole, Zero3
from sorsa_ds.model.sorsa_recipe import adapt_to_sorsa, working_set
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.decompose import Decomposition, decompose
from sorsa_ds.sorsa.residual_storage import Dense

SETTINGS = SorsaConfig()
CPU = torch.device("cpu")
DS = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}


def found(
    weight: torch.Tensor, rank: int, name: str, method: str = "randomized", tolerance: float = SETTINGS.svd_tolerance
) -> Decomposition:
    """A decomposition, with the trainer's default settings but for those that are given."""
    return decompose(weight, rank, name, method, tolerance, SETTINGS.svd_max_iterations)


def main() -> None:
    """Run the side that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(SIDES))
    parser.add_argument("--method", default="randomized")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=SETTINGS.svd_tolerance)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[SETTINGS.svd_tolerance])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--flat", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_side(SIDES[arguments.what], arguments)


def load_model(a: argparse.Namespace) -> dict:
    """Initialise a model in fp32: the default one, whole on every rank, or that of a folder, sharded for ZeRO-3.

    Returns `seconds`, from the empty skeleton to the last exchange, and `decomposing`, the seconds of each round's
    slowest rank, summed over the rounds: waiting for one another is in it, the exchange is not.
    """
    folder = a.folder or ensure_embedded_model(lambda text: None)
    placement = Zero3(DS, CPU) if a.folder else Whole(CPU)
    torch.distributed.barrier()
    began = time.perf_counter()
    loaded = load_adapted_model(
        folder,
        lambda model: adapt_to_sorsa(
            model, AdapterConfig(rank=a.rank), resolve_precision("fp32", None, "cpu"), Dense(torch.float32), CPU,
            lambda target, weight, digest=None: found(weight, target.rank, target.name, a.method, a.tolerance),
        ),
        loading=LoadingConfig(), placement=placement, device=CPU,
    )  # fmt: skip
    torch.distributed.barrier()
    seconds = time.perf_counter() - began
    spent = {report.name: report.seconds for report in loaded.reports}
    items = [Item(t.name, torch.Size((t.out_features, t.in_features)), t) for t in loaded.targets]
    rounds = schedule(items, collectives.world_size())
    return {"seconds": seconds, "decomposing": sum(max(spent[item.name] for item in one if item) for one in rounds)}


def load_peft(a: argparse.Namespace) -> dict:
    """Seconds of what a PEFT user does: from_pretrained, then get_peft_model with PiSSA by svd_lowrank."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = ensure_embedded_model(lambda text: None)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=a.rank, target_modules="all-linear", init_lora_weights="pissa_niter_4"))
    return {"seconds": time.perf_counter() - began}


def energy_excess(a: argparse.Namespace) -> dict:
    """The worst excess of residual energy over the optimum, on all matrices of the default model: PEFT's, and ours."""
    weights = PretrainedWeights(ensure_embedded_model(lambda text: None))
    worst = {"pissa_niter_4": 0.0, **dict.fromkeys(map(str, a.tolerances), 0.0)}
    for name in (name for name in weights.names if "_proj.weight" in name):
        W = weights.read(name).float()
        tail = torch.linalg.svdvals(W.double())[a.rank :].square().sum().item()
        U, s, V = torch.svd_lowrank(W, a.rank, niter=4)
        made = {"pissa_niter_4": (U, s, V)}
        for tolerance in a.tolerances:
            ours = found(W, a.rank, name.removesuffix(".weight"), tolerance=tolerance)
            made[str(tolerance)] = ours.U, ours.s, ours.V
        for key, (u, d, v) in made.items():
            left = (W.double() - (u.double() * d.double()) @ v.double().T).square().sum().item()
            worst[key] = max(worst[key], left / tail - 1)
    return worst


def full_svd(a: argparse.Namespace) -> dict:
    """Seconds of the full SVD and of ours, on a square matrix with the spectrum of a real layer, interpolated."""
    weights = PretrainedWeights(ensure_embedded_model(lambda text: None))
    real = torch.linalg.svdvals(weights.read("model.layers.10.self_attn.q_proj.weight").double())
    places = torch.linspace(0, 1, a.size, dtype=torch.float64) * (len(real) - 1)
    low = places.floor().long().clamp(max=len(real) - 2)
    spectrum = real[low] + (places - low) * (real[low + 1] - real[low])
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(a.size, a.size, generator=generator))[0] for _ in range(2))
    W = (left * spectrum.float()) @ right.T
    began = time.perf_counter()
    _, s, _ = torch.linalg.svd(W, full_matrices=False)
    full = time.perf_counter() - began
    began = time.perf_counter()
    factors = found(W, a.rank, "benchmark")
    ours = time.perf_counter() - began
    rest = (W - (factors.U * factors.s) @ factors.V.T).double().square().sum().item()
    return {"full": full, "ours": ours, "excess": rest / s[a.rank :].double().square().sum().item() - 1}


def write_checkpoint(a: argparse.Namespace) -> dict:
    """Write a Llama of about the wanted size to disk."""
    return {"layers": write_llama(a.folder, a.gib, a.flat)}


def peak_memory(a: argparse.Namespace) -> dict:
    """Peak resident memory above the start of a ZeRO-3 initialisation, and the budget it should keep to."""
    placement, adapter = Zero3(DS, CPU), AdapterConfig(rank=a.rank)
    with Peak() as peak:
        formats = resolve_precision("mixed", None, "cpu")
        loaded = load_adapted_model(
            a.folder,
            lambda model: adapt_to_sorsa(
                model, adapter, formats, Dense(formats.residual_dtype), CPU,
                lambda target, weight, digest=None: found(weight, target.rank, target.name, a.method),
            ),
            loading=LoadingConfig(), placement=placement, device=CPU,
        )  # fmt: skip
    shard = sum(p.ds_tensor.nbytes for p in loaded.model.parameters())
    working = max(working_set(target, SorsaConfig(svd=a.method), Dense(torch.float32)) for target in loaded.targets)
    return {"rss": peak.gib, "shard": shard / 2**30, "budget": (shard + working) / 2**30}


def from_pretrained_memory(a: argparse.Namespace) -> dict:
    """Peak resident memory above the start of transformers' own loader, which every rank runs in full."""
    from transformers import AutoModelForCausalLM

    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(a.folder, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # a mapped file takes no memory until it is read
    return {"rss": peak.gib}


SIDES = {
    "load": load_model,
    "peft": load_peft,
    "excess": energy_excess,
    "full": full_svd,
    "write": write_checkpoint,
    "memory": peak_memory,
    "from_pretrained": from_pretrained_memory,
}

if __name__ == "__main__":
    main()
