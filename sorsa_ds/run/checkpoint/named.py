"""Which runs --resume and output.name mean, as far as the names of files and folders tell.

No checkpoint is read, and nothing heavy imported.
"""

from pathlib import Path

from sorsa_ds.config.differences import LENGTH, differences
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.best import BestSoFar
from sorsa_ds.run.checkpoint.folder import BEST, LATEST, best_checkpoint, checkpoint_path
from sorsa_ds.run.finished import FinishedRun, RunState, near_runs
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.paths import run_of
from sorsa_ds.run.ways_on import beginning_anew, evaluating, from_a_taken_name


def named_folder(request: str) -> Path:
    """The folder that --resume names: a run's, or a checkpoint's.

    Raises:
        ValueError: there is no such folder, or it is neither a run's nor a checkpoint's.
    """
    path = Path(request).expanduser().absolute()
    run = RunState(run_of(path))
    if not path.is_dir():
        hint = f"; the run's newest is {run.checkpoints[0]}" if run.checkpoints else near_runs(run.folder)
        raise ValueError(f"--resume: there is no folder {path}{hint}")
    if path == run.folder:
        run.check_is_run("--resume")
    return path


def named_checkpoints(request: str, config: RunConfig) -> list[Path]:
    """The checkpoints from which --resume FOLDER may go on, the best first: those of a run, or the one that is named.

    Args:
        config: the settings with which it goes on.

    Raises:
        ValueError: there is no such run or checkpoint, or the run still trains, has none, or is finished and neither
            asked for more steps nor, where it stopped early, to wait longer.
    """
    path = named_folder(request)
    run = RunState(run_of(path))
    if path != run.folder:
        check_not_running(run)
        return [path]
    if run.is_finished and not (_is_of_other_length(run, config) or _waits_longer(run, config)):
        if _stopped_early(run):
            raise ValueError(
                f"--resume: {run.folder} is finished: it stopped early (evaluation.patience="
                f"{config.evaluation.patience}); to go on with it, set evaluation.patience to more, or to 0; to "
                f"evaluate it: {evaluating(run.folder)}"
            )
        raise ValueError(
            f"--resume: {run.folder} is finished; to go on with it, ask for more train.steps, or name one of its "
            f"checkpoints to go on from there once more; to evaluate it: {evaluating(run.folder)}"
        )
    check_not_running(run)
    if not run.checkpoints:
        raise ValueError(f"--resume: {run.folder} has saved nothing; to begin it anew: {beginning_anew(run.folder)}")
    return run.checkpoints


def _is_of_other_length(run: RunState, config: RunConfig) -> bool:
    """Whether the settings ask for another number of steps than a run was begun with. More or fewer shows later."""
    return any(name in LENGTH for name in differences(config, run.saved_settings()))


def _stopped_early(run: RunState) -> bool:
    """Whether a finished run has made fewer steps than were planned."""
    report = FinishedRun(run.folder).report()
    steps, planned = report.get("steps"), report.get("planned_steps")
    return isinstance(steps, int) and isinstance(planned, int) and steps < planned


def _waits_longer(run: RunState, config: RunConfig) -> bool:
    """Whether a finished run stopped early and would not stop there by the settings with which it goes on."""
    if not _stopped_early(run):
        return False
    account = BestSoFar().after_all(read_metrics(run.folder), config.evaluation.min_delta)
    return not account.has_waited(config.evaluation.patience)


def named_checkpoint(run: Path, name: str, option: str) -> Path:
    """A checkpoint of a run, by what people call it.

    Args:
        name: `best` (the lowest held-out loss), `latest`, a number of steps, or the name of its folder.
        option: the command-line option that says so, for the message.

    Raises:
        ValueError: the run has no such checkpoint; with those that it has.
    """
    state = RunState(run)
    state.check_is_run(option)
    if name == BEST:
        found = best_checkpoint(run)
    elif name == LATEST:
        found = next(iter(state.checkpoints), None)
    else:
        wanted = checkpoint_path(run, int(name)).name if name.isdecimal() else name
        found = next((path for path in state.checkpoints if path.name == wanted), None)
    if found is None:
        there = ", ".join(path.name for path in state.checkpoints) or "none at all"
        why = ""
        if name == BEST:
            why = ": a run keeps the best one where it has held-out data, unless evaluation.keep_best=false"
        raise ValueError(f"{option}: {run} has no checkpoint {name!r}{why}; it has {there}")
    return found


def check_unused(run: RunState) -> None:
    """Stop where a new run would get the folder of another.

    Raises:
        ValueError: the folder holds a run.
    """
    if run.has_begun:
        raise ValueError(f"output.name: {run.folder} holds a run already, {from_a_taken_name(run)}")


def check_not_running(run: RunState) -> None:
    """Stop where a process trains in the run's folder.

    Raises:
        ValueError: one does.
    """
    if run.is_running:
        raise ValueError(f"--resume: {run.folder} still trains; end that process first")
