"""Where a run stops or is refused, the command that leads on, as it can be typed. Tests run these commands."""

from pathlib import Path

from sorsa_ds.run.finished import RunState
from sorsa_ds.run.paths import AUTO, CONFIG, GIVEN_DS_CONFIG
from sorsa_ds.runtime.launcher import begin_again, beside, command, same_command
from sorsa_ds.runtime.words import typed


def going_on(run: Path) -> str:
    """The command that goes on with a run from its newest checkpoint."""
    return command("--resume", typed(run))


def beginning_anew(run: Path) -> str:
    """The command that begins a run anew which has saved nothing, in its own folder and with its own settings."""
    return command(
        *("--config", typed(run / CONFIG), "--ds_config", typed(run / GIVEN_DS_CONFIG)),
        *(f"output.folder={typed(run.parent)}", f"output.name={run.name}", "--resume", AUTO),
    )


def evaluating(run: Path) -> str:
    """The command that measures a finished run's held-out loss."""
    return beside("python", "evaluate.py", "--model", typed(run), "--task", "loss")


def merging(run: Path) -> str:
    """The command that writes a finished run as a model of transformers."""
    output = typed(run.with_name(f"{run.name}-merged"))
    return beside("python", "export.py", "--run", typed(run), "--format", "merged", "--output", output)


def under_another_name(run: Path) -> str:
    """The command that was typed, with a name for the run that is free."""
    number = 2
    while (other := run.with_name(f"{run.name}-{number}")).exists():
        number += 1
    return same_command(f"output.name={other.name}", without="output.name")


def from_a_taken_name(run: RunState) -> str:
    """What can be done where a new run was given the name of an earlier one, as the end of a sentence."""
    if run.is_running or run.is_finished:
        state = "still trains" if run.is_running else "is finished"
        return f"which {state}; to train another: {under_another_name(run.folder)}"
    if run.checkpoints:
        return f"which is unfinished; to go on with it: {going_on(run.folder)}"
    return f"which has saved nothing; to begin it anew: {begin_again()}"
