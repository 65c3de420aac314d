"""A finished run as a sequence of steps: the weight and the factors of each linear at each of them.

The weights of experts that a model holds as one parameter are linears here, one for each expert: `<name>.<expert>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.targets import Target, as_matrices
from sorsa_ds.run.merge import merged
from sorsa_ds.run.paths import REPORT
from sorsa_ds.run.snapshots import existing_snapshots, held_linears, stored_linears
from sorsa_ds.run.source import Source, open_finished_run
from sorsa_ds.sorsa.decompose import Factors


@dataclass(frozen=True, slots=True)
class History:
    """A run, the linears of which it has snapshots, and those snapshots by step.

    stacks: name of a linear of an expert -> (the target with the weights of all experts, the expert's number).
    """

    source: Source
    linears: list[Target]
    snapshots: dict[int, Path]
    stacks: dict[str, tuple[Target, int]]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.source.adapter.parent

    @property
    def steps(self) -> list[int]:
        """The steps of the start (0), of the snapshots and of the end."""
        last = self.source.report["steps"]
        return [0, *(step for step in self.snapshots if 0 < step < last), last]

    def weight(self, target: Target, step: int) -> Tensor:
        """A linear's merged weight (M, N) in fp32, as training computed with it after `step` steps.

        At step 0 that is the pre-trained weight as the run kept it: rounded or quantised where its residual was.

        Raises:
            ValueError: the base model is not the one that was trained on, or a snapshot is damaged.
        """
        stack, number = self.stacks.get(target.name, (target, 0))
        name = stack.weight
        source = self._at(step)
        if source is None:
            weight = self.source.weights.parameter(name).to(self.source.precision.factor_dtype).float()
        else:
            weight = merged(source, name)
        # Merged weights are laid out as in the base model, which may keep them transposed.
        matrix = stack.each(as_matrices(weight, stack))[number]
        return matrix.clone() if stack.experts else matrix  # a view would keep the weights of all experts

    def factors(self, target: Target, step: int) -> Factors | None:
        """SORSA's U (M, R), s (R,) and V (N, R), from the fp32 masters; None for other methods."""
        source = self._at(step)
        stack, number = self.stacks.get(target.name, (target, 0))
        found = None if source is None else source.method.factors(source.trained, stack)
        return found if found is None else Factors(*(stack.each(factor)[number] for factor in found.tensors()))

    def _at(self, step: int) -> Source | None:
        """The run as if it had ended after `step` steps; None where that is the base model itself."""
        if step == self.source.report["steps"]:
            return self.source
        if step == 0:
            initial = self.source.initial
            return None if initial is None else replace(self.source, trained=initial)
        return replace(self.source, trained=FactorFile(self.snapshots[step]))


def open_history(run: Path, base: str | None = None, trust_remote_code: bool = False) -> History:
    """The history of a finished run's folder.

    Its linears are those that every snapshot holds, because settings may have changed where the run was resumed.
    Without snapshots they are those that the settings name.

    Args:
        base: folder or hub name of the base model, where it has moved.
        trust_remote_code: allow Python code that comes with the base model, where the adapter was trained with it.

    Raises:
        ValueError: the folder holds no finished run or a damaged one, the base model has other layers, a snapshot is
            damaged, or the snapshots have no linear in common.
    """
    source, snapshots = open_finished_run(run, base, trust_remote_code), existing_snapshots(run)
    _check_report(source.report, run / REPORT)
    if snapshots:
        stored = held_linears(source.model, source.config, snapshots.values())
    else:
        stored = stored_linears(source.model, source.config)
    stacks = {stack.one(number).name: (stack, number) for stack in stored for number in range(stack.experts)}
    linears = [target.one(number) for target in stored for number in range(target.matrices)]
    return History(source, linears, snapshots, stacks)


def _check_report(report: object, path: Path) -> None:
    """Stop where a run's report lacks an entry that the analysis shows.

    Raises:
        ValueError: the message names the file and the entry.
    """
    entries = report if isinstance(report, dict) else {}
    for name in ("steps", "loss_last", "eval_loss_start", "eval_loss_end", "trainable_parameters"):
        if name not in entries:
            raise ValueError(f"{path} is damaged: it has no {name}")
    if not isinstance(entries["steps"], int) or entries["steps"] < 1:
        raise ValueError(f"{path} is damaged: steps is {entries['steps']!r}, no integer >= 1")


def names_of(runs: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's name, with the folder above it where two runs have the same.

    Raises:
        ValueError: a run is given twice.
    """
    runs = [run.expanduser().resolve() for run in runs]
    for run in runs:
        if runs.count(run) > 1:
            raise ValueError(f"--run: {run} is named twice")
    short = [run.name for run in runs]
    names = short if len(set(short)) == len(runs) else [f"{run.parent.name}/{run.name}" for run in runs]
    return names if len(set(names)) == len(runs) else [str(run) for run in runs]
