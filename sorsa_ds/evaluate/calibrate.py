"""Which directions of their inputs the linears of a base model use least, on its own texts or on a given one.

The second moments of a linear's inputs, E[x x^T] over the tokens, are summed in fp64, of as many linears at once as
have room, in several passes over the texts; then their eigenvectors with the smallest eigenvalues are taken.
Shapes: W (M, N), T tokens, K directions that are kept.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sorsa_ds.config.adapter_settings import AdapterConfig
from sorsa_ds.evaluate.calibrate_options import BATCH_SIZE, SAMPLES, SEED, CalibrateOptions
from sorsa_ds.evaluate.drift import Place, own_texts
from sorsa_ds.evaluate.models import FoundModel, find_evaluated_model
from sorsa_ds.evaluate.options import WINDOW, Options
from sorsa_ds.evaluate.tasks.loss import windows_of
from sorsa_ds.evaluate.tasks.task import Setting
from sorsa_ds.model.input_directions import Directions, Origin, is_directions_file, probe_of, write_directions
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
    left_out: linears of which the file has nothing: fewer tokens reach them than they have inputs.
    experts: stacks of experts, whose inputs are not measured.
    """

    linears: int
    tokens: int
    share: float
    left_out: list[str]
    experts: list[str]


def calibrate(options: CalibrateOptions) -> Calibrated:
    """Write the directions of a base model's linears to a file.

    Raises:
        ValueError: the model or the data does not fit, the model gives NaN, no linear sees enough tokens, the output
            is something else already or cannot be written, or several ranks were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("calibrate works in one process, which takes all GPUs: start it with python, without launcher")
    device_type = start_process()
    found = find_evaluated_model(options.model, trust_remote_code=options.trust_remote_code)
    if found.kind != "model":
        raise ValueError(
            f"--model: directions are those of a base model, and {options.model} is a {found.kind}; name the model "
            f"that it was trained from"
        )
    output = options.output.expanduser().absolute()
    check_output(output, found.folder)
    name, why = precision.resolve_inference_dtype(options.dtype, device_type)
    say(why)
    place = Place(this_device(), torch.bfloat16 if name == "bf16" else torch.float32, options.batch_size or BATCH_SIZE)
    texts, told = _texts(options, found, place)
    model = found.load(place.device, place.dtype)
    selection = choose(model, AdapterConfig(rank=1), refused_experts=_EXPERTS)
    kept, shares = {}, []
    for target, directions, share in least_used(model, selection.targets, texts, options.rank):
        kept[target.name] = directions
        shares.append(share)
    tokens, inputs = sum(map(len, texts)), max(target.in_features for target in selection.targets)
    more = "--samples" if options.data is None else "a longer text in --data"
    if not kept:
        raise ValueError(f"{tokens:,} tokens are fewer than any linear has inputs: {more}")
    write_directions(output, kept, Origin(options.model, told, tokens))
    left_out = [target.name for target in selection.targets if target.name not in kept]
    experts = [name for name, reason in selection.left_out.items() if reason == _EXPERTS]
    done = Calibrated(len(kept), tokens, sum(shares) / len(shares), left_out, experts)
    say(_summary(output, done, told))
    if tokens < ENOUGH * inputs:
        say(
            f"{tokens:,} tokens are few for a linear of {inputs:,} inputs: from {ENOUGH * inputs:,} on, the directions "
            f"that are used least differ from those that these texts happen to leave out. Better: {more}."
        )
    return done


def check_output(path: Path, model: Path) -> None:
    """Stop before the work where the file cannot be written at its end, or would take the place of something else.

    Args:
        model: the base model's folder, whose files are not to be mixed with others.

    Raises:
        ValueError: naming the path and why.
    """
    if path.is_dir() or (path.exists() and not is_directions_file(path)):
        raise ValueError(f"--output: {path} is there, and is no file of directions; name another")
    if path.resolve().parent == model.resolve():
        raise ValueError(f"--output: {path} would lie among the files of the base model; name another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error}") from error


def _texts(options: CalibrateOptions, found: FoundModel, place: Place) -> tuple[list[list[int]], str]:
    """The tokens of the texts that are read, and a sentence on them.

    Raises:
        ValueError: the text cannot be read, or the model cannot write any.
    """
    setting = Setting(load_tokenizer(found.tokenizer, found.loading), found.tokenizer, found.positions())
    if options.data is None:
        asked = Options(
            options.model, "drift", samples=options.samples or SAMPLES, sample_tokens=options.sample_tokens,
            seed=SEED if options.seed is None else options.seed,
        )  # fmt: skip
        windows, told = own_texts(asked, found, setting, found.digest(), place)
        return [window["input_ids"].tolist() for window in windows.values()], told
    window = min(WINDOW, setting.positions or WINDOW)
    asked = Options(options.model, "loss", data=options.data, limit=options.limit, window=window, stride=window - 1)
    windows, told = windows_of(asked, setting)
    texts = []
    for name, part in windows.items():
        again = 0 if name.endswith("/0") else 1  # the last token of the window before
        texts.append(part["input_ids"][again:].tolist())
    return texts, told


def least_used(
    model: PreTrainedModel, targets: Sequence[Target], texts: Sequence[Sequence[int]], rank: int
) -> Iterator[tuple[Target, Directions, float]]:
    """Of each linear that enough tokens reach: its directions, and what share of its inputs, squared, the first hold.

    Args:
        rank: K, where a linear has as many inputs.

    Raises:
        ValueError: a linear's inputs hold NaN or Inf.
    """
    groups = list(_groups(targets, ROOM))
    for group in tracked(groups, len(groups), "measuring inputs", "pass"):
        yield from _of_group(model, group, texts, rank)


def _of_group(
    model: PreTrainedModel, group: Sequence[Target], texts: Sequence[Sequence[int]], rank: int
) -> Iterator[tuple[Target, Directions, float]]:
    """The part of `least_used` that one pass over the texts finds."""
    moments = input_moments(model, group, texts)
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for target in group:
        moment = moments.pop(target.name, None)
        if moment is None or moment.tokens < target.in_features:
            continue
        sum_NN = moment.sum_NN
        if not bool(sum_NN.isfinite().all()):
            raise ValueError(
                f"--model: the inputs of {target.name} hold NaN or Inf on these texts: the model is broken"
            )
        if before is None or not _same(before[0], sum_NN):  # the queries', keys' and values' inputs are one
            before = None  # so that it takes no room beside the next
            before = sum_NN, *torch.linalg.eigh(sum_NN)
        used_N, basis_NN = before[1:]
        if not used_N[-1] > 0:
            continue
        weight = model.get_parameter(target.weight)
        probe_M = probe_of(target.name, weight.t() if target.transposed else weight)
        share = (used_N[:SHOWN].clamp(min=0).sum() / used_N.clamp(min=0).sum()).item()
        yield target, Directions(basis_NN[:, :rank].t().float().cpu(), probe_M.cpu()), share


@dataclass(slots=True)
class Moment:
    """The sum of x x^T (N, N) over the tokens that have reached a linear, in fp64."""

    sum_NN: Tensor
    tokens: int


@torch.no_grad()
def input_moments(
    model: PreTrainedModel, targets: Sequence[Target], texts: Iterable[Sequence[int]]
) -> dict[str, Moment]:
    """The second moments of the inputs of the linears that are called, by their names.

    The texts go through the model one by one: padding would be summed too.
    """
    sums = _Moments()
    with ExitStack() as held:
        held.enter_context(full_fp32_products())  # TF32 rounds as bf16 does, and hides the least used directions
        for target in targets:
            for name in target.places:
                held.enter_context(_hooked(model.get_submodule(name), sums, target.name))
        for text in texts:
            model(input_ids=torch.tensor([list(text)], device=model.device), use_cache=False)
            sums.forget_inputs()
    return sums.by_name


class _Moments:
    """Sums of x x^T. Linears that are called with one tensor one after the other share its product."""

    def __init__(self) -> None:
        self.by_name: dict[str, Moment] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None
        """The tensor of the last call, its version, and its product with itself."""

    def add(self, name: str, inputs: Tensor) -> None:
        x_TN = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._last is None or self._last[0] is not inputs or self._last[1] != inputs._version:
            self._last = inputs, inputs._version, x_TN.t().double() @ x_TN.double()
        product_NN = self._last[2]
        if name in self.by_name:
            self.by_name[name].sum_NN += product_NN
            self.by_name[name].tokens += len(x_TN)
        else:
            self.by_name[name] = Moment(product_NN.clone(), len(x_TN))

    def forget_inputs(self) -> None:
        """Let no tensor of one text be taken for one of the next."""
        self._last = None


def _hooked(linear: nn.Module, sums: _Moments, name: str) -> RemovableHandle:
    """A context in which a linear's inputs are summed under a name, however it is called."""

    def hook(_: nn.Module, given: tuple, named: dict) -> None:
        [inputs] = (*given, *named.values())
        sums.add(name, inputs)

    return linear.register_forward_pre_hook(hook, with_kwargs=True)


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


def _summary(path: Path, done: Calibrated, told: str) -> str:
    rows = [
        ("linears", f"{done.linears}"),
        ("texts", f"{told.removeprefix('Texts: ')} {done.tokens:,} tokens."),
        ("least used", f"{SHOWN} directions hold {done.share:.1e} of the inputs, squared (mean over the linears)"),
        ("written to", str(path)),
    ]
    lines = [table(rows)]
    if done.left_out:
        lines.append(
            f"{len(done.left_out)} linears see fewer tokens than they have inputs, or zeros alone ({done.left_out[0]} "
            f"is one); the file has nothing of them, and training with it refuses them."
        )
    if done.experts:
        lines.append(
            f"{len(done.experts)} stacks of experts are left out: their inputs are not measured. Train with "
            f"adapter.experts=frozen."
        )
    return "\n".join(lines)
