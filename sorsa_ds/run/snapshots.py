"""The snapshots of a run, taken for its analysis: which linears are in them, and where they lie.

A snapshot holds what is trained in those linears after a step, in fp32 under the parameters' names: SORSA's U, s and V,
a LoRA's A and B, whole weights.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.module_names import check_all_match, matches
from sorsa_ds.model.targets import Target
from sorsa_ds.run.paths import SNAPSHOTS

_NAME = re.compile(r"step-(\d{6,})\.safetensors")


def adapted_linears(model: nn.Module, config: RunConfig) -> list[Target]:
    """All that a run trains, in module order: with `full` every linear that could be adapted."""
    return method_of(config).trained_linears(model, config.adapter)


def stored_linears(model: nn.Module, config: RunConfig) -> list[Target]:
    """The linears that `analysis.layers` names, in module order.

    Args:
        model: the base model; it needs no memory.

    Raises:
        ValueError: a pattern matches none of the adapted linears; with what there is.
    """
    adapted = adapted_linears(model, config)
    wanted = config.analysis.layers
    if wanted == "all":
        return adapted
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if not patterns:
        raise ValueError("analysis.layers: the list is empty; `all` is every adapted linear, analysis.every=0 is none")
    check_all_match("analysis.layers", patterns, [target.name for target in adapted])
    return [target for target in adapted if any(matches(target.name, pattern) for pattern in patterns)]


def snapshot_path(run: Path, step: int) -> Path:
    """The snapshot after `step` optimizer steps."""
    return run / SNAPSHOTS / f"step-{step:06d}.safetensors"


def existing_snapshots(run: Path) -> dict[int, Path]:
    """A run's snapshots by step, in order."""
    found = [_NAME.fullmatch(path.name) for path in (run / SNAPSHOTS).glob("*.safetensors")]
    return {step: snapshot_path(run, step) for step in sorted(int(name[1]) for name in found if name)}


def held_linears(model: nn.Module, config: RunConfig, snapshots: Iterable[Path]) -> list[Target]:
    """Those of the linears that a run adapts of which every snapshot holds something.

    Raises:
        ValueError: a snapshot is damaged, or they have no linear in common.
    """
    paths, adapted = list(snapshots), adapted_linears(model, config)
    under = method_of(config).trained_under(model, adapted)
    stored = [sorted(FactorFile(path).names) for path in paths]
    found = [target for target in adapted if all(_any_begins(names, under[target.name]) for names in stored)]
    if not found:
        raise ValueError(
            f"{paths[0].parent}: the snapshots have no linear of this run in common; was analysis.layers changed on "
            f"the way? Remove those that are of other linears"
        )
    return found


def check_continues(model: nn.Module, config: RunConfig, run: Path, steps_done: int) -> None:
    """Stop where a run that goes on would store other linears than it has stored so far.

    Only what every snapshot holds can be compared over the steps.

    Raises:
        ValueError: naming a linear that is not in both; or a snapshot is damaged.
    """
    kept = [path for step, path in existing_snapshots(run).items() if step <= steps_done]
    if not kept:
        return
    held = [target.name for target in held_linears(model, config, kept)]
    if differing := set(held).symmetric_difference(target.name for target in stored_linears(model, config)):
        name = min(differing)
        raise ValueError(
            f"analysis.layers: {name} is {'stored' if name in held else 'not stored'} in {kept[-1]}, and would "
            f"{'not ' if name in held else ''}be from here on: name the same linears as before, or analysis.every=0"
        )


def _any_begins(names: list[str], beginning: str) -> bool:
    """Whether one of the names, which are sorted, begins so."""
    place = bisect_left(names, beginning)
    return place < len(names) and names[place].startswith(beginning)
