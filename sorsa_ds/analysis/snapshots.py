"""The snapshots of a run: of which linears, and where they lie.

A snapshot holds what is trained in those linears after a step, in fp32 under the parameters' names: SORSA's U, s and V,
a LoRA's A and B, whole weights.
"""

import re
from pathlib import Path

from torch import nn

from sorsa_ds.config import RunConfig, SorsaConfig
from sorsa_ds.run_paths import SNAPSHOTS
from sorsa_ds.surgery import Target, check_all_match, matches, select

_NAME = re.compile(r"step-(\d{6,})\.safetensors")


def stored_linears(model: nn.Module, config: RunConfig) -> list[Target]:
    """The linears that `analysis.layers` names, in module order.

    Args:
        model: the base model; it needs no memory.

    Raises:
        ValueError: a pattern matches none of the adapted linears; with what there is.
    """
    adapted = select(model, SorsaConfig(rank=1) if config.method == "full" else config.sorsa)
    wanted = config.analysis.layers
    if wanted == "all":
        return adapted
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if not patterns:
        raise ValueError("analysis.layers: the list is empty; `all` is every adapted linear, analysis.every=0 is none")
    check_all_match("analysis.layers", patterns, [target.name for target in adapted])
    return [target for target in adapted if any(matches(target.name, pattern) for pattern in patterns)]


def path_of(run: Path, step: int) -> Path:
    """The snapshot after `step` optimizer steps."""
    return run / SNAPSHOTS / f"step-{step:06d}.safetensors"


def existing(run: Path) -> dict[int, Path]:
    """A run's snapshots by step, in order."""
    found = [_NAME.fullmatch(path.name) for path in (run / SNAPSHOTS).glob("*.safetensors")]
    return {step: path_of(run, step) for step in sorted(int(name[1]) for name in found if name)}
