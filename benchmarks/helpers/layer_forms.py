"""Other ways to write one adapted linear: seconds, measured in turns, and bytes that each keeps for backward.

Every form is compared with the one that differs from it in a single respect. `ours` is the product's autograd function;
`composed` is the same mathematics left to autograd.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.helpers.common import DTYPES, autocast_to, say
from benchmarks.helpers.turns import in_turns, ratio
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Dense

PAIRS = {
    "ours / composed": ("ours", "composed"), "compiled / composed": ("compiled", "composed"),
    "compiled / ours": ("compiled", "ours"),
    "s in U / s on x V": ("folded", "composed"), "casts kept / made": ("cached", "ours"),
    "q, k, v joined / three": ("joined", "three"), "kept joined / three": ("kept_joined", "three"),
}  # fmt: skip
"""The ratios that are printed: seconds of the first over those of the second."""


@dataclass(slots=True)
class Side:
    """One form of the layer. leaves: tensors that get gradients. frozen: parameters that get none."""

    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    frozen: list[Tensor]


def compare(a: argparse.Namespace) -> dict:
    """Print a table for each dtype, over numbers of tokens and ranks; returns the medians over the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict = {}
    for name, dtype in DTYPES.items():
        ratios: dict[str, list[float]] = {}
        say(f"one linear {a.linear[0]} x {a.linear[1]}, {name}: ratios of seconds (quartiles); KiB kept for backward")
        for tokens in a.tokens:
            for rank in a.ranks:
                sides = forms(*a.linear, rank, dtype, device)
                agree(sides, a.linear[1], tokens, dtype, device)
                x = torch.randn(tokens, a.linear[1], device=device, dtype=dtype, requires_grad=True)
                seconds = in_turns({key: both(side, x, dtype) for key, side in sides.items()}, 3 * a.rounds)
                kept = {key: kept_bytes(side, x, dtype) / 1024 for key, side in sides.items()}
                middle = 1e3 * statistics.median(seconds["ours"])
                say(f"  {tokens} tokens, r = {rank}: ours {middle:.2f} ms")
                for told, (one, other) in PAIRS.items():
                    if one in sides:
                        found, low, high = ratio(seconds[one], seconds[other])
                        ratios.setdefault(told, []).append(found)
                        bytes_kept = f"{kept[one]:.0f} / {kept[other]:.0f}"
                        say(f"    {told:24} {found:.3f} ({low:.3f} .. {high:.3f})   {bytes_kept}")
        for told, found in ratios.items():
            result[f"{told}, {name}"] = statistics.median(found)
    return {"layer": result, "cached_cast_bytes_per_number": DTYPES["bf16"].itemsize}


def forms(m: int, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Side]:
    """All forms with the same weights, by name.

    dtype: the dtype of the frozen weight; the factors are in fp32.
    """
    torch.manual_seed(0)
    layers = [SorsaLinear(n, m, rank, device=device, storage=Dense(dtype)) for _ in range(3)]
    for parameter in (p for layer in layers for p in layer.parameters()):
        nn.init.normal_(parameter, std=max(parameter.shape) ** -0.5)
    first = layers[0]
    sides = {
        "ours": _side(first, [first]),
        "composed": _side(lambda x: composed(x, first), [first]),
        "folded": _side(lambda x: linear(x, first.residual) + (x @ first.V) @ (first.U * first.s).t(), [first]),
        "three": _side(lambda x: tuple(composed(x, layer) for layer in layers), layers),
        "joined": _side(lambda x: _split(x, torch.cat([layer.V for layer in layers], 1), layers), layers),
    }
    joined = torch.cat([layer.V.detach() for layer in layers], 1).requires_grad_()
    factors = [p for layer in layers for p in (layer.U, layer.s)]
    sides["kept_joined"] = Side(
        lambda x: _split(x, joined, layers), [*factors, joined], [layer.residual for layer in layers]
    )
    if dtype != torch.float32:
        narrow = SorsaLinear(n, m, rank, device=device, storage=Dense(dtype), factor_dtype=dtype)
        narrow.load_state_dict(first.state_dict())
        sides["cached"] = _side(narrow, [narrow])
    if (compiled := compile_form(first, dtype)) is not None:
        sides["compiled"] = _side(compiled, [first])
    return sides


def composed(x: Tensor, layer: SorsaLinear) -> Tensor:
    """The layer (SORSA, eq. 8) as autograd composes it."""
    return linear(x, layer.residual) + ((x @ layer.V) * layer.s) @ layer.U.t()


def _split(x: Tensor, V_N3R: Tensor, layers: list[SorsaLinear]) -> tuple[Tensor, ...]:
    """Three layers of one input, whose products with V are computed as one."""
    parts = (x @ V_N3R).chunk(len(layers), -1)
    return tuple(
        linear(x, layer.residual) + (z * layer.s) @ layer.U.t() for z, layer in zip(parts, layers, strict=True)
    )


def _side(forward: Callable, layers: Iterable[SorsaLinear]) -> Side:
    parameters = [p for layer in layers for p in layer.parameters()]
    return Side(forward, [p for p in parameters if p.requires_grad], [p for p in parameters if not p.requires_grad])


def compile_form(layer: SorsaLinear, dtype: torch.dtype) -> Callable | None:
    """torch.compile of `composed`; where it fails on a first try, the reason is printed and None returned."""
    torch.compiler.reset()
    form = torch.compile(lambda x: composed(x, layer), dynamic=False)
    try:
        with autocast_to(dtype, layer.U.device):
            form(torch.randn(2, layer.in_features, device=layer.U.device, dtype=dtype, requires_grad=True))
    except Exception as error:  # the compilers behind it raise errors of many kinds
        say(f"  torch.compile left out: {str(error).strip().splitlines()[0][:160]}")
        return None
    return form


def both(side: Side, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A function that takes a form forward and backward."""
    with torch.no_grad(), autocast_to(dtype, x.device):
        outputs = _tuple(side.forward(x))
    gradients = [torch.ones_like(y) for y in outputs]

    def run() -> None:
        for leaf in (x, *side.leaves):
            leaf.grad = None
        with autocast_to(dtype, x.device):
            made = _tuple(side.forward(x))
        torch.autograd.backward(made, gradients)

    return run


def kept_bytes(side: Side, x: Tensor, dtype: torch.dtype) -> int:
    """Bytes that a forward keeps for backward: x once, the parameters not at all."""
    held = {p.untyped_storage().data_ptr() for p in (*side.leaves, *side.frozen)}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # kept alive, so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast_to(dtype, x.device):
        side.forward(x)
    return sum(kept.values())


def agree(sides: dict[str, Side], n: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check that the forms of each pair compute the same.

    Raises:
        AssertionError: two outputs differ by more than rounding.
    """
    x = torch.randn(tokens, n, device=device, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    with torch.no_grad(), autocast_to(dtype, device):
        for one, other in PAIRS.values():
            if one in sides:
                for y, z in zip(_tuple(sides[one].forward(x)), _tuple(sides[other].forward(x)), strict=True):
                    torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
