"""What a run's folder says of the run at a glance, in milliseconds: whole files are not read where a part suffices.

Nothing heavy is imported, and nothing in a folder can stop the list of the others: a damaged run is listed as such.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from sorsa_ds.config.yaml_reader import fault_of, parse_yaml
from sorsa_ds.run.finished import FinishedRun, RunState
from sorsa_ds.run.metrics import parse_step
from sorsa_ds.run.paths import CONFIG, ENDED, METRICS
from sorsa_ds.runtime.json_text import read_json

State = Literal["running", "finished", "interrupted", "failed", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """A run at a glance; None stands for what its folder does not say.

    state: interrupted is a run without an end of its own: it was told to stop, or killed.
    why: the reason for the state, where one is known.
    steps: the number of finished steps.
    planned: the number of steps that the run was to have.
    loss: the training loss of the last step.
    eval_loss, eval_step: the lowest held-out loss after the first step, and after which step that was.
    last_active: when the run's log (its settings, where it has no log yet) was written last, in seconds since 1970.
    """

    name: str
    folder: str
    state: State
    why: str = ""
    model: str | None = None
    method: str | None = None
    steps: int = 0
    planned: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    last_active: float = 0.0


def runs_in(folder: Path) -> list[RunFacts]:
    """The runs of a folder, the last active first; the folder's own where it is a run itself.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        places = [folder] if RunState(folder).is_run else sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    found = [facts_of(place) for place in places if _looks_like_a_run(place)]
    return sorted(found, key=lambda facts: -facts.last_active)


def facts_of(folder: Path) -> RunFacts:
    """What a run's folder says of it. Where a file is damaged, that is the run's state, with what was read before."""
    facts = RunFacts(name=folder.name, folder=str(folder), state="interrupted")
    try:
        for more in (_of_log, _of_settings, _of_state):
            facts = more(facts, RunState(folder))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return replace(facts, state="damaged", why=" ".join(str(error).split()))
    return facts


def _looks_like_a_run(folder: Path) -> bool:
    try:
        return RunState(folder).is_run
    except OSError:  # a folder of somebody else
        return False


def _of_log(facts: RunFacts, run: RunState) -> RunFacts:
    """How far the run is, from metrics.jsonl: only its evaluations and its last step are parsed."""
    path = run.folder / METRICS
    if not path.exists():
        return replace(facts, last_active=(run.folder / CONFIG).stat().st_mtime)
    facts = replace(facts, last_active=path.stat().st_mtime)
    last, evaluated = (0, b""), []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # it is being written, or a kill has cut it
            if b'"eval_loss"' in line:
                evaluated.append((number, line))
            elif b'"loss"' in line:
                last = number, line
    for number, line in evaluated:
        read = parse_step(line, path, number)
        loss = _number(read, "eval_loss", path, number)
        if read["step"] > 0 and (facts.eval_loss is None or loss < facts.eval_loss):
            facts = replace(facts, eval_loss=loss, eval_step=read["step"])
    if last[1]:
        read = parse_step(last[1], path, last[0])
        facts = replace(facts, steps=read["step"], loss=_number(read, "loss", path, last[0]))
    return facts


def _number(line: dict, key: str, path: Path, number: int) -> float:
    if not isinstance(value := line.get(key), int | float):
        raise ValueError(f"{path}, line {number}: {key} is no number; the file is damaged")
    return value


def _of_settings(facts: RunFacts, run: RunState) -> RunFacts:
    """The model, the method and the planned steps, from those lines of config.yaml that have them.

    All of it would take thirty times as long, which shows with hundreds of runs.
    """
    path = run.folder / CONFIG
    kept, section = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            section = line.partition(":")[0]
        if line.startswith(("model:", "method:", "train:")) or (section == "train" and line.startswith("  steps:")):
            kept.append(line)
    try:
        read = parse_yaml("\n".join(kept))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({fault_of(error)})") from error
    if not isinstance(read, dict) or not all(isinstance(read.get(name), str) for name in ("model", "method")):
        raise ValueError(f"{path}: names no model and method")
    steps = train.get("steps") if isinstance(train := read.get("train"), dict) else None
    return replace(facts, model=read["model"], method=read["method"], planned=steps if isinstance(steps, int) else None)


def _of_state(facts: RunFacts, run: RunState) -> RunFacts:
    """Whether the run trains, is finished, or has ended otherwise."""
    if run.is_running:
        return replace(facts, state="running")
    if run.is_finished:
        report = FinishedRun(run.folder).report()
        planned = report.get("planned_steps", facts.steps)
        early = isinstance(planned, int) and facts.steps < planned
        return replace(facts, state="finished", why="stopped early" if early else "", planned=planned)
    ended = run.folder / ENDED
    if ended.exists():
        told = read_json(ended)
        if not isinstance(told, dict) or told.get("state") not in ("failed", "interrupted"):
            raise ValueError(f"{ended}: says nothing known; damaged")
        return replace(facts, state=told["state"], why=" ".join(str(told.get("why", "")).split()))
    if not run.has_begun:
        return replace(facts, state="failed", why="it has not begun")
    return facts
