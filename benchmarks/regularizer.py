"""The regulariser's step by itself, at the paper's shapes: time, flops, bytes sent, against autograd on whole matrices.

    python benchmarks/regularizer.py                  Llama 2 7B, r = 128: 448 matrices, 3 GB; a minute on two cores
    python benchmarks/regularizer.py --layers 4       the same on fewer of its layers

Ours is what the engine calls once a step: Gram matrices and values, then the gradients' addition to the masters. Its
peers are autograd of the same penalty on whole matrices, and the authors' `calc_ortho` with its backward; all take
turns in one process.

The share of a step is of the paper's, 128 sequences of 512 tokens: by counted flops, and by seconds, the step's being
its flops at the speed at which this machine multiplies large matrices in the dtype of the step. The last line is one
JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from common import say
from peers import reference_layers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turns, ratio, synchronise

from sorsa_ds.config import DataConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.masters import Fragment, Masters
from sorsa_ds.plan.facts import Facts, facts
from sorsa_ds.plan.job import Hardware, Job
from sorsa_ds.plan.speed import flops
from sorsa_ds.regularizer import Regularizer
from sorsa_ds.shapes import shipped
from sorsa_ds.sharded_grams import ShardedGrams
from sorsa_ds.sharded_regularizer import ShardedRegularizer

MODEL = "meta-llama/Llama-2-7b-hf"
SEQUENCES, LENGTH, LAYERS = 128, 512, 32


def main() -> None:
    """Measure, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model's 32")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job, model = paper(a.rank)
    matrices = factors(model, a.layers, device)
    ours = Ours(matrices, device)
    sides = {"ours": ours.step, "autograd": autograd(matrices), "reference": reference(matrices)}
    agree(ours, matrices)
    seconds = in_turns(sides, a.rounds)
    with FlopCounterMode(display=False) as counted:
        ours.step()
    part = a.layers / LAYERS  # what was measured, of the whole model
    step = flops(job, model) * part
    speed = product_speed(device)
    mine = statistics.median(seconds["ours"])
    result = {
        "matrices": len(matrices),
        "regularizer_seconds": mine,
        "regularizer_vs_autograd": ratio(seconds["ours"], seconds["autograd"])[0],
        "regularizer_vs_reference": ratio(seconds["ours"], seconds["reference"])[0],
        "regularizer_share_flops": counted.get_total_flops() / step,
        "regularizer_share": mine / (step / speed),
        "regularizer_bytes": ours.buffer_bytes(),
        "gathered_bytes_avoided": sum(x.nbytes for x in matrices.values()),
    }
    for key, value in result.items():
        say(f"{key:28} {value if isinstance(value, int) else format(value, '.4g')}")
    print(json.dumps(result))


def paper(rank: int) -> tuple[Job, Facts]:
    """The paper's step as a job, and its model."""
    config = RunConfig(
        model=MODEL, sorsa=SorsaConfig(rank=rank), data=DataConfig(max_length=LENGTH),
        train=TrainConfig(precision="mixed", micro_batch_size=2, global_batch_size=SEQUENCES),
    )  # fmt: skip
    job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware())
    return job, facts(shipped(MODEL), job)


def factors(model: Facts, layers: int, device: torch.device) -> dict[str, Tensor]:
    """U and V of every linear of the first layers, near orthonormal, by name."""
    generator = torch.Generator(device).manual_seed(0)
    made = {}
    for target in model.targets[: layers * len(model.targets) // LAYERS]:
        for leaf, rows in (("U", target.out_features), ("V", target.in_features)):
            numbers = torch.randn(rows, target.rank, generator=generator, device=device)
            made[f"{target.name}.{leaf}"] = numbers * rows**-0.5
    return made


class Ours:
    """The engine's regulariser on masters that are these matrices, whole."""

    def __init__(self, matrices: dict[str, Tensor], device: torch.device):
        self.masters = {name: x.clone() for name, x in matrices.items()}
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        fragments = [Fragment(name, x.shape, 0, x.numel(), x, 0) for name, x in self.masters.items()]
        shapes = {name: x.shape for name, x in matrices.items()}
        grams = ShardedGrams(Masters(fragments, sharded=False), shapes, device)
        self._regularizer = ShardedRegularizer(Regularizer("norm", "mean", 0.2), grams)

    def step(self) -> Tensor:
        """What the engine does with it in one step; L_reg."""
        value, _ = self._regularizer.prepare()
        for master in self.masters.values():
            self._regularizer.add_to(master)
        return value

    def buffer_bytes(self) -> int:
        """Of the one all-reduce: a Gram matrix a factor, in fp64."""
        return sum(8 * x.shape[1] ** 2 for x in self.masters.values())


def autograd(matrices: dict[str, Tensor]):
    """The same penalty and its gradient by autograd on whole matrices in fp32."""
    leaves = [x.clone().requires_grad_() for x in matrices.values()]

    def step() -> Tensor:
        norms = [torch.linalg.matrix_norm(x.t() @ x - torch.eye(x.shape[1], device=x.device)) for x in leaves]
        loss = torch.stack(norms).mean()
        (0.2 * loss).backward()
        return loss.detach()

    step.leaves = dict(zip(matrices, leaves, strict=True))
    return step


def reference(matrices: dict[str, Tensor]):
    """The authors' function and its backward."""
    holder = nn.Module()
    for i, (name, x) in enumerate(matrices.items()):
        leaf = "sorsa_B" if name.endswith(".U") else "sorsa_A"
        value = x.clone() if leaf == "sorsa_B" else x.t().contiguous()
        holder.register_parameter(f"{leaf}{i}", nn.Parameter(value))
    calculate = reference_layers().calc_ortho

    def step() -> Tensor:
        loss = calculate(holder)
        (0.2 * loss).backward()
        return loss.detach()

    return step


def agree(ours: Ours, matrices: dict[str, Tensor]) -> None:
    """Stop where the sides do not compute the same thing: nothing would be compared."""
    theirs = autograd(matrices)
    torch.testing.assert_close(ours.step().float(), theirs(), rtol=1e-4, atol=0)
    for name, leaf in theirs.leaves.items():
        torch.testing.assert_close(ours.masters[name].grad, leaf.grad, rtol=1e-3, atol=1e-7)


def product_speed(device: torch.device, size: int = 2048) -> float:
    """flop/s of a product of large matrices, fp32 on a CPU and bf16 on a GPU: the dtype that training takes there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        synchronise()
        began = time.perf_counter()
        a @ b
        synchronise()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
