"""Forward and backward of one adapted linear against PEFT's LoRA, the authors' layer, and the frozen linear alone.

    python benchmarks/layer.py                                                             1024 x 1024, fp32: a CPU
    python benchmarks/layer.py --shape 4096 4096 --dtype bf16 --tokens 1 128 4096 32768    a GPU

All four take turns in one process. The frozen weight has the dtype, what is trained is in fp32, and bf16 is computed
under autocast. The last line is one JSON object: the ratios' medians over all numbers of tokens and ranks, their
extremes, and all seconds.
"""

import argparse
import json
import statistics

import torch

from benchmarks.helpers.common import DTYPES, autocast_to, say
from benchmarks.helpers.peers import as_reference, layers
from benchmarks.helpers.turns import in_turns, ratio


def main() -> None:
    """Time every number of tokens and rank, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 1024], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512, 4096, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, dict[tuple[int, int], float]] = {"frozen": {}, "lora": {}, "reference": {}}
    measured = []
    say(f"{'tokens':>7} {'rank':>5} {'frozen ms':>10} {'sorsa ms':>10} | over frozen, lora, reference (quartiles)")
    for tokens in a.tokens:
        for rank in a.ranks:
            seconds = measure(a, tokens, rank, device)
            measured.append({"tokens": tokens, "rank": rank, "seconds": seconds})
            told = []
            for peer, table in found.items():
                table[tokens, rank], low, high = ratio(seconds["sorsa"], seconds[peer])
                told.append(f"{table[tokens, rank]:.3f} ({low:.3f} .. {high:.3f})")
            times = (1e3 * statistics.median(seconds[side]) for side in ("frozen", "sorsa"))
            say(f"{tokens:>7} {rank:>5} {next(times):>10.3f} {next(times):>10.3f} | " + ", ".join(told))
    result: dict = {"layer": {"shape": a.shape, "dtype": a.dtype, "measured": measured}}
    for peer, table in found.items():
        values = sorted(table.values())
        result[f"layer_vs_{peer}"] = statistics.median(values)
        result[f"layer_vs_{peer}_extremes"] = [values[0], values[-1]]
    print(json.dumps(result))


def measure(a: argparse.Namespace, tokens: int, rank: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of forward and backward in each round, by layer."""
    torch.manual_seed(0)
    m, n = a.shape
    dtype = DTYPES[a.dtype]
    x = torch.randn(tokens, n, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, m, device=device, dtype=dtype)

    def side(layer: torch.nn.Module):
        def both() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            with autocast_to(dtype, device):
                y = layer(x)
            y.backward(grad)

        return both

    peers = layers(m, n, rank, dtype, device)
    peers["reference"] = as_reference(peers["sorsa"])
    return in_turns({name: side(layer) for name, layer in peers.items()}, a.rounds)


if __name__ == "__main__":
    main()
