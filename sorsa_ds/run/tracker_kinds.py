"""The experiment trackers that accelerate knows: what each needs, and how a run introduces itself to it.

Only what is asked here is imported, and no tracker before it is used.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorsa_ds.config.watch_settings import TrackerName

Arguments = dict[str, Any]
Rows = Sequence[Sequence[Any]]
COLUMNS = ("step", "prompt", "expected", "answer")
"""The columns of a table of answers."""


_ESCAPED = {ord(sign): f"&#{ord(sign)};" for sign in "\\`*_{}[]()<>#|~&!"}
"""What Markdown or HTML would read as more than text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """How a run introduces itself to a tracker.

    folder: the run's folder.
    project: the setting `output.wandb_project`.
    mode: the mode of wandb, online or offline.
    id: the id by which the tracker knows the run, or may come to know it.
    continues: whether the tracker knows the run already.
    """

    folder: Path
    project: str
    mode: str
    id: str
    continues: bool


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """One of accelerate's trackers.

    packages: any of which it needs. pip: what installs it.
    arguments: makes those of accelerate's class.
    own_id: the id that the tracker itself has given to the run; None where it takes ours.
    tell: shows rows of COLUMNS after a step; None where it has no place for texts.
    """

    packages: tuple[str, ...]
    pip: str
    arguments: Callable[[Introduction], Arguments]
    own_id: Callable[[Any], str] | None = None
    tell: Callable[[Any, Rows, int], None] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether one of its packages can be imported."""
        return any(importlib.util.find_spec(package) is not None for package in self.packages)


def check_installed(names: Sequence[TrackerName]) -> None:
    """Stop where a tracker is asked for whose package is not there.

    Raises:
        ValueError: naming all of them, with the command that installs them.
    """
    lacking = [name for name in names if not KINDS[name].is_installed]
    if lacking:
        needed = " ".join(KINDS[name].pip for name in lacking)
        raise ValueError(f"output.trackers: not installed here: {', '.join(lacking)}; pip install {needed}")


def _wandb(run: Introduction) -> Arguments:
    return {
        "run_name": run.project, "name": run.folder.name, "id": run.id, "resume": "allow", "dir": run.folder,
        "mode": run.mode,
    }  # fmt: skip


def _tensorboard(run: Introduction) -> Arguments:
    return {"run_name": "tensorboard", "logging_dir": run.folder}


def _mlflow(run: Introduction) -> Arguments:
    return {
        "experiment_name": run.project, "run_name": run.folder.name, "run_id": run.id if run.continues else None
    }  # fmt: skip


def _comet(run: Introduction) -> Arguments:
    from comet_ml import ExperimentConfig

    # Without the switches it would take the program, its output and its repository's changes to its server.
    described = ExperimentConfig(
        name=run.folder.name, log_code=False, log_git_metadata=False, log_git_patch=False, parse_args=False,
        auto_output_logging=False, auto_metric_logging=False, auto_param_logging=False,
    )  # fmt: skip
    return {"run_name": run.project, "experiment_key": run.id, "mode": "get_or_create", "experiment_config": described}


def _trackio(run: Introduction) -> Arguments:
    # It knows a run by its name within the project alone: two folders of one name would be one run without the id.
    return {
        "run_name": run.project, "name": run.id if run.continues else f"{run.folder.name}-{run.id[:8]}",
        "resume": "allow",
    }  # fmt: skip


def _swanlab(run: Introduction) -> Arguments:
    return {
        "run_name": run.project, "name": run.folder.name, "id": run.id[:21], "resume": "allow",
        "log_dir": str(run.folder / "swanlog"),
    }  # fmt: skip


def _aim(run: Introduction) -> Arguments:
    known = {"run_hash": run.id} if run.continues else {}
    return {"run_name": run.folder.name, "logging_dir": run.folder.parent, "experiment": run.project, **known}


def _clearml(run: Introduction) -> Arguments:
    # Without the switches it would take the models and everything that is printed to its server.
    return {
        "run_name": run.project, "project_name": run.project, "task_name": run.folder.name,
        "reuse_last_task_id": False, "continue_last_task": run.id if run.continues else False,
        "auto_connect_frameworks": False, "auto_connect_arg_parser": False, "auto_connect_streams": False,
    }  # fmt: skip


def _dvclive(run: Introduction) -> Arguments:
    # It would commit to the repository of the current folder otherwise.
    return {
        "dir": str(run.folder / "dvclive"), "resume": run.continues, "save_dvc_exp": False, "dvcyaml": False,
        "monitor_system": False,
    }  # fmt: skip


def _as_table(tracker: Any, rows: Rows, step: int) -> None:
    tracker.log_table("samples", columns=list(COLUMNS), data=[list(row) for row in rows], step=step)


def markdown(rows: Rows) -> str:
    """Rows of COLUMNS as a table in Markdown, whose cells are shown as they are."""

    def cell(value: Any) -> str:
        return "<br>".join(str(value).translate(_ESCAPED).splitlines())

    lines = [COLUMNS, ["---"] * len(COLUMNS), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _to_tensorboard(tracker: Any, rows: Rows, step: int) -> None:
    tracker.log({"samples": markdown(rows)}, step=step)


def _to_mlflow(tracker: Any, rows: Rows, step: int) -> None:
    import mlflow

    mlflow.log_text(markdown(rows), f"samples/step-{step:06d}.md")


def _to_comet(tracker: Any, rows: Rows, step: int) -> None:
    tracker.tracker.log_text(markdown(rows), step=step)


KINDS: dict[TrackerName, TrackerKind] = {
    "wandb": TrackerKind(("wandb",), "wandb", _wandb, tell=_as_table),
    "tensorboard": TrackerKind(("tensorboard", "tensorboardX"), "tensorboard", _tensorboard, tell=_to_tensorboard),
    "mlflow": TrackerKind(("mlflow",), "mlflow", _mlflow, lambda one: one.tracker.info.run_id, _to_mlflow),
    "comet_ml": TrackerKind(("comet_ml",), "comet_ml", _comet, tell=_to_comet),
    "trackio": TrackerKind(("trackio",), "trackio", _trackio, lambda one: one.init_kwargs["name"]),
    "swanlab": TrackerKind(("swanlab",), "swanlab", _swanlab),
    "aim": TrackerKind(("aim",), "'aim<4'", _aim, lambda one: one.tracker.hash),
    "clearml": TrackerKind(("clearml",), "clearml", _clearml, lambda one: one.tracker.id, _as_table),
    "dvclive": TrackerKind(("dvclive",), "dvclive", _dvclive),
}
