"""Which directions of their inputs the linears of a base model use least, on its own texts or on a given one.

The second moments of a linear's inputs, E[x x^T] over the tokens, are summed in fp64, of as many linears at once as
have room, in several passes over the texts; then their eigenvectors with the smallest eigenvalues are taken.
Shapes: W (M, N), T tokens, K directions that are kept.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sorsa_ds.config.adapter_settings import AdapterConfig
from sorsa_ds.data.tokenize import Example
from sorsa_ds.evaluate.calibrate_options import CalibrateOptions
from sorsa_ds.evaluate.drift import Place, own_texts
from sorsa_ds.evaluate.models import FoundModel, find_evaluated_model
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks.loss import windows_of
from sorsa_ds.evaluate.tasks.task import Setting
from sorsa_ds.model.input_directions import Directions, Origin, images_of, write_directions
from sorsa_ds.model.selection import choose
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.runtime import precision
from sorsa_ds.runtime.console import say, table, tracked
from sorsa_ds.runtime.device import this_device
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.runtime.process import start_process

ROOM = 8 * 2**30
"""Bytes of second moments that are summed in one pass over the texts; those of one linear may be more."""
ENOUGH = 4
"""So many tokens for each input of a linear are needed to tell its least used directions apart, or the user is told."""
SHOWN = 16
"""Of how many directions the user is told how little they are used."""
_EXPERTS = "their experts' inputs are not measured"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was found.

    share: how much of a linear's inputs lies in the `SHOWN` least used directions, squared; the mean over linears.
    unreached: linears whose input no text reaches; the file has nothing of them.
    """

    linears: int
    tokens: int
    share: float
    unreached: list[str]


def calibrate(options: CalibrateOptions) -> Calibrated:
    """Write the directions of a base model's linears to a file.

    Raises:
        ValueError: the model or the data does not fit, several ranks were started, or the disk refuses.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("calibrate works in one process, which takes all GPUs: start it with python, without launcher")
    device_type = start_process()
    found = find_evaluated_model(options.model, trust_remote_code=options.trust_remote_code)
    if found.kind != "model":
        raise ValueError(f"--model: directions are those of a base model, and {options.model} is a {found.kind}")
    name, why = precision.resolve_inference_dtype(options.dtype, device_type)
    say(why)
    place = Place(this_device(), torch.bfloat16 if name == "bf16" else torch.float32, options.batch_size)
    texts, told = _texts(options, found, place)
    model = found.load(place.device, place.dtype)
    selection = choose(model, AdapterConfig(rank=1), refused_experts=_EXPERTS)
    tokens, kept, shares = sum(len(text["input_ids"]) for text in texts), {}, []
    for target, directions, share in least_used(model, selection.targets, texts, options.rank):
        kept[target.name] = directions
        shares.append(share)
    unreached = [target.name for target in selection.targets if target.name not in kept]
    write_directions(options.output, kept, Origin(options.model, told, tokens))
    done = Calibrated(len(kept), tokens, sum(shares) / len(shares), unreached)
    say(_summary(options.output, done, told, max(target.in_features for target in selection.targets)))
    return done


def _texts(options: CalibrateOptions, found: FoundModel, place: Place) -> tuple[list[Example], str]:
    """The texts that are read, and a sentence on them.

    Raises:
        ValueError: the text cannot be read, or the model cannot write any.
    """
    setting = Setting(load_tokenizer(found.tokenizer, found.loading), found.tokenizer, found.positions())
    if options.data is not None:
        asked = Options(options.model, "loss", data=options.data, limit=options.limit)
        windows, told = windows_of(asked, setting)
    else:
        asked = Options(
            options.model, "drift", samples=options.samples, sample_tokens=options.sample_tokens, seed=options.seed
        )
        windows, told = own_texts(asked, found, setting, found.digest(), place)
    return list(windows.values()), told


def least_used(
    model: PreTrainedModel, targets: Sequence[Target], texts: Sequence[Example], rank: int
) -> Iterator[tuple[Target, Directions, float]]:
    """Of each linear that the texts reach: its directions, and what share of its inputs, squared, the first hold.

    Args:
        rank: K, where a linear has as many inputs.
    """
    groups = list(_groups(targets, ROOM))
    for group in tracked(groups, len(groups), "measuring inputs", "pass"):
        moments = input_moments(model, group, texts)
        before: tuple[Tensor, Tensor, Tensor] | None = None
        for target in group:
            moment_NN = moments.pop(target.name, None)
            if moment_NN is None:
                continue
            if before is None or not _same(before[0], moment_NN):  # the queries', keys' and values' inputs are one
                before = moment_NN, *torch.linalg.eigh(moment_NN)
            used_N, basis_NN = before[1:]
            directions_KN = basis_NN[:, :rank].t().float().contiguous()
            weight = model.get_parameter(target.weight)
            with full_fp32_products():
                images_K = images_of(weight.t() if target.transposed else weight, directions_KN)
            share = (used_N[:SHOWN].clamp(min=0).sum() / used_N.sum()).item()
            yield target, Directions(directions_KN.cpu(), images_K.cpu()), share


@torch.inference_mode()
def input_moments(model: PreTrainedModel, targets: Sequence[Target], texts: Iterable[Example]) -> dict[str, Tensor]:
    """The sums of x x^T (N, N) in fp64 over all tokens, of the linears that are called, by their names.

    The texts go through the model one by one: padding would be summed too.
    """
    sums = _Moments()
    with ExitStack() as hooks:
        for target in targets:
            for name in target.places:
                hooks.enter_context(_hooked(model.get_submodule(name), sums, target.name))
        for text in texts:
            model(input_ids=torch.tensor(text["input_ids"], device=model.device, dtype=torch.long)[None])
    return sums.by_name


class _Moments:
    """Sums of x x^T. Linears that are called with one tensor one after the other share its product."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._inputs: Tensor | None = None
        self._product_NN: Tensor

    def add(self, name: str, inputs: Tensor) -> None:
        if inputs is not self._inputs:
            x_TN = inputs.detach().flatten(0, -2).double()
            self._inputs, self._product_NN = inputs, x_TN.t() @ x_TN
        if name in self.by_name:
            self.by_name[name] += self._product_NN
        else:
            self.by_name[name] = self._product_NN.clone()


def _hooked(linear: nn.Module, sums: _Moments, name: str) -> RemovableHandle:
    """A context in which a linear's inputs are summed under a name."""
    return linear.register_forward_pre_hook(lambda _, given: sums.add(name, given[0]))


def _groups(targets: Sequence[Target], room: int) -> Iterator[list[Target]]:
    """The linears in their order, in groups whose second moments have room together."""
    group: list[Target] = []
    taken = 0
    for target in targets:
        own = 8 * target.in_features**2
        if group and taken + own > room:
            yield group
            group, taken = [], 0
        group.append(target)
        taken += own
    yield group


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def _summary(path: Path, done: Calibrated, told: str, inputs: int) -> str:
    rows = [
        ("linears", f"{done.linears}"),
        ("texts", f"{told.removeprefix('Texts: ')} {done.tokens:,} tokens."),
        ("least used", f"{SHOWN} directions hold {done.share:.1e} of the inputs, squared (mean over the linears)"),
        ("written to", str(path)),
    ]
    lines = [table(rows)]
    if done.unreached:
        lines.append(
            f"No text reaches the input of {len(done.unreached)} linears ({done.unreached[0]} is one); the file has "
            f"nothing of them, and training with it refuses them."
        )
    if done.tokens < ENOUGH * inputs:
        lines.append(
            f"{done.tokens:,} tokens are few for a linear of {inputs:,} inputs: at least {ENOUGH * inputs:,} tell the "
            f"directions that are used least from those that these texts happen to leave out. Ask for more: --samples."
        )
    return "\n".join(lines)
