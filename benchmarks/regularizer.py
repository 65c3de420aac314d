"""The regulariser alone, at the paper's shapes: seconds, flops and bytes sent, against autograd on whole matrices.

    python benchmarks/regularizer.py                  Llama 2 7B, r = 128: 448 matrices, 3 GB
    python benchmarks/regularizer.py --layers 4       fewer of its layers

Ours is what the engine calls once per step: it computes Gram matrices and L_reg, and adds the gradients to the masters.
Its peers are autograd of the same L_reg on whole matrices, and the authors' `calc_ortho` with its backward. All take
turns in one process.

The result is also given as a share of the paper's step, 128 sequences of 512 tokens: by counted flops, and by seconds.
For the latter a step takes its flops at the speed of this machine in large bf16 products. The last line is one JSON
object.
"""

import argparse
import json
import statistics

import torch
from torch import Tensor, nn

from benchmarks.helpers.common import say
from benchmarks.helpers.flops import flop_counter, product_speed
from benchmarks.helpers.peers import reference_layers
from benchmarks.helpers.turns import in_turns, ratio
from sorsa_ds.config.schema import AdapterConfig, DataConfig, RunConfig, TrainConfig
from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.engine.regularize import ShardedRegularizer
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.model_facts import Facts, facts
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.plan.speed import flops
from sorsa_ds.sorsa.regularizer import Regularizer

MODEL = "meta-llama/Llama-2-7b-hf"
SEQUENCES, LENGTH, LAYERS = 128, 512, 32
COEFFICIENT = 0.2


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the model's 32 that are taken")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job, model = paper(a.rank)
    matrices = factors(model, a.layers, device)
    ours = Ours(matrices, device)
    peers = {"autograd": Autograd(matrices), "reference": Reference(matrices)}
    agree(ours, peers, matrices)
    seconds = in_turns({name: side.step for name, side in {"ours": ours, **peers}.items()}, a.rounds)
    with flop_counter() as counted:
        ours.step()
    part = a.layers / LAYERS  # the share of the model that is measured
    step = flops(job, model) * part
    speed = product_speed(device, torch.bfloat16)
    mine = statistics.median(seconds["ours"])
    result = {
        "matrices": len(matrices),
        "regularizer_seconds": mine,
        "regularizer_vs_autograd": ratio(seconds["ours"], seconds["autograd"])[0],
        "regularizer_vs_reference": ratio(seconds["ours"], seconds["reference"])[0],
        "regularizer_share_flops": counted.get_total_flops() / step,
        "regularizer_share": mine / (step / speed),
        "regularizer_sides": {name: {"seconds": taken} for name, taken in seconds.items()},
        "regularizer_bytes": ours.buffer_bytes(),
        "gathered_bytes_avoided": sum(x.nbytes for x in matrices.values()),
    }
    for key, value in result.items():
        if not isinstance(value, dict):
            say(f"{key:28} {value if isinstance(value, int) else format(value, '.4g')}")
    print(json.dumps(result))


def paper(rank: int) -> tuple[Job, Facts]:
    """The planner's job and model of the paper's step."""
    config = RunConfig(
        model=MODEL, adapter=AdapterConfig(rank=rank), data=DataConfig(max_length=LENGTH),
        train=TrainConfig(precision="mixed", micro_batch_size=2, global_batch_size=SEQUENCES),
    )  # fmt: skip
    job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware())
    return job, facts(shipped(MODEL), job)


def factors(model: Facts, layers: int, device: torch.device) -> dict[str, Tensor]:
    """U and V of every linear of the first layers, random and nearly orthonormal, by name."""
    generator = torch.Generator(device).manual_seed(0)
    made = {}
    for target in model.targets[: layers * len(model.targets) // LAYERS]:
        for leaf, rows in (("U", target.out_features), ("V", target.in_features)):
            numbers = torch.randn(rows, target.rank, generator=generator, device=device)
            made[f"{target.name}.{leaf}"] = numbers * rows**-0.5
    return made


class Ours:
    """The engine's regulariser, with whole matrices as masters."""

    def __init__(self, matrices: dict[str, Tensor], device: torch.device):
        self.masters = {name: x.clone() for name, x in matrices.items()}
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        fragments = [Fragment(name, x.shape, 0, x.numel(), x, 0) for name, x in self.masters.items()]
        shapes = {name: x.shape for name, x in matrices.items()}
        grams = ShardedGrams(Masters(fragments, sharded=False), shapes, device)
        self._regularizer = ShardedRegularizer(Regularizer("norm", "mean", COEFFICIENT), grams)

    def step(self) -> Tensor:
        """What the engine does once per step; returns L_reg."""
        value, _ = self._regularizer.prepare()
        self._regularizer.add_to(list(self.masters.values()))
        return value

    def gradient(self, name: str) -> Tensor:
        """What has been added to the gradient of a matrix so far."""
        return self.masters[name].grad

    def buffer_bytes(self) -> int:
        """Bytes of a step's one all-reduce: a Gram matrix in fp64 for each factor."""
        return sum(8 * x.shape[1] ** 2 for x in self.masters.values())


class Autograd:
    """L_reg (SORSA, eq. 9) and its gradient by autograd, on whole matrices in fp32."""

    def __init__(self, matrices: dict[str, Tensor]):
        self._leaves = {name: x.clone().requires_grad_() for name, x in matrices.items()}

    def step(self) -> Tensor:
        """Add the gradient of L_reg to the leaves'; returns L_reg."""
        leaves = self._leaves.values()
        norms = [torch.linalg.matrix_norm(x.t() @ x - torch.eye(x.shape[1], device=x.device)) for x in leaves]
        loss = torch.stack(norms).mean()
        (COEFFICIENT * loss).backward()
        return loss.detach()

    def gradient(self, name: str) -> Tensor:
        """What has been added to the gradient of a matrix so far."""
        return self._leaves[name].grad


class Reference:
    """The authors' function `calc_ortho` and its backward; it takes V transposed."""

    def __init__(self, matrices: dict[str, Tensor]):
        self._calculate = reference_layers().calc_ortho
        self._holder, self._places = nn.Module(), {}
        for i, (name, x) in enumerate(matrices.items()):
            place = self._places[name] = f"sorsa_B{i}" if name.endswith(".U") else f"sorsa_A{i}"
            value = x.clone() if name.endswith(".U") else x.t().contiguous()
            self._holder.register_parameter(place, nn.Parameter(value))

    def step(self) -> Tensor:
        """Add the gradient of L_reg to the parameters'; returns L_reg."""
        loss = self._calculate(self._holder)
        (COEFFICIENT * loss).backward()
        return loss.detach()

    def gradient(self, name: str) -> Tensor:
        """What has been added to the gradient of a matrix so far."""
        found = getattr(self._holder, self._places[name]).grad
        return found if name.endswith(".U") else found.t()


def agree(ours: Ours, peers: dict[str, Autograd | Reference], matrices: dict[str, Tensor]) -> None:
    """Check that all sides compute the same.

    Raises:
        AssertionError: values or gradients differ by more than rounding.
    """
    value = ours.step().float()
    for theirs in peers.values():
        torch.testing.assert_close(value, theirs.step(), rtol=1e-4, atol=0)
        for name in matrices:
            torch.testing.assert_close(ours.gradient(name), theirs.gradient(name), rtol=1e-3, atol=1e-7)


if __name__ == "__main__":
    main()
