"""All decompositions of a model of a given shape: seconds, and how near they come to what memory bandwidth allows.

    python benchmarks/init_shapes.py --model 7b        the 224 matrices of Llama-2-7B's shape
    python benchmarks/init_shapes.py --model 70b       the 560 of Llama-2-70B's
    python benchmarks/init_shapes.py --model tiny      a small one, for a CPU

Matrices are made on the device, one at a time, with singular values that fall like a language model's; making them is
not timed. A matrix's time is that of its decomposition and its residual, from and to bf16. The floor is the time in
which every matrix can be read and written once in bf16, at the bandwidth of a large copy, which is measured first. The
last line is one JSON object.
"""

import argparse
import json
import time
from collections import Counter

import torch

from benchmarks.helpers.common import heavy_tailed
from benchmarks.helpers.turns import synchronise
from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.sorsa.decompose import decompose, residual

SHAPES = {
    "7b": {"layers": 32, "matrices": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]},
    "70b": {"layers": 80, "matrices": [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)]
            + [(28672, 8192)] * 2 + [(8192, 28672)]},
    "tiny": {"layers": 2, "matrices": [(256, 256)] * 4 + [(688, 256)] * 2 + [(256, 688)]},
}  # fmt: skip


def main() -> None:
    """Time every matrix, print a line per shape and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="layers to decompose (default: all of the model)")
    arguments = parser.parse_args()
    device, model = torch.device(arguments.device), SHAPES[arguments.model]
    layers = arguments.layers or model["layers"]
    bandwidth = copy_bandwidth(device)
    seconds, counts, excess = Counter(), Counter(), 0.0
    for layer in range(layers):
        for place, shape in enumerate(model["matrices"]):
            draw = torch.Generator(device).manual_seed(hash(shape) % 2**31 + int(f"{layer}{place}"))
            W = heavy_tailed(*shape, device, draw)
            if not counts[shape]:  # the first matrix of a shape would pay for kernels and workspaces
                timed(W, arguments.rank, "warm up")
            took, found = timed(W, arguments.rank, f"{layer}.{place}")
            seconds[shape] += took
            counts[shape] += 1
            excess = max(excess, found)
    total = sum(seconds.values())
    floor = sum(4 * m * n * count for (m, n), count in counts.items()) / bandwidth
    for (m, n), count in counts.items():
        print(f"{m} x {n}: {count} matrices, {seconds[m, n]:.2f} s, {1e3 * seconds[m, n] / count:.2f} ms each")
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(json.dumps({
        "model": arguments.model, "matrices": counts.total(), "rank": arguments.rank, "seconds": total,
        "floor_seconds": floor, "fraction_of_floor": floor / total, "worst_excess_estimate": excess,
        "copy_gb_per_s": bandwidth / 1e9, "hardware": hardware, "torch": torch.__version__,
    }))  # fmt: skip


def timed(W: torch.Tensor, rank: int, name: str) -> tuple[float, float]:
    """Seconds of one matrix's decomposition and residual, and the estimate of its excess residual energy."""
    config = SorsaConfig()
    synchronise()
    began = time.perf_counter()
    with full_fp32_products():
        found = decompose(W, rank, name, "randomized", config.svd_tolerance, config.svd_max_iterations)
        residual(W, found, used_dtype=torch.bfloat16).bfloat16()
    synchronise()
    return time.perf_counter() - began, found.accuracy.excess


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronise()
    began = time.perf_counter()
    for _ in range(5):
        target.copy_(source)
    synchronise()
    return 5 * 2 * source.nbytes / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
