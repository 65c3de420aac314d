"""The state of a run, as its folder tells it: does it still train, is it finished, and what can be read from it."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sorsa_ds.config import command_line
from sorsa_ds.config.renamed import renamed_sections
from sorsa_ds.config.schema import OutputConfig, RunConfig
from sorsa_ds.config.yaml_reader import fault_of, parse_yaml
from sorsa_ds.run.checkpoint.folder import existing_checkpoints
from sorsa_ds.run.paths import CONFIG, METRICS, REPORT
from sorsa_ds.runtime.folder_lock import is_held
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.runtime.launcher import beside
from sorsa_ds.runtime.words import typed


@dataclass(frozen=True, slots=True)
class RunState:
    """The folder of a run, in whatever state the run is. Every question looks at the disk anew."""

    folder: Path

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run's: training writes the settings into it before the first step."""
        return (self.folder / CONFIG).exists()

    @property
    def has_begun(self) -> bool:
        """Whether the folder is taken by a run: one that has measured something, or has saved or finished.

        A run that fails before that leaves an empty log, which takes nobody's name.
        """
        metrics = self.folder / METRICS
        return self.is_finished or bool(self.checkpoints) or (metrics.exists() and metrics.stat().st_size > 0)

    @property
    def is_running(self) -> bool:
        """Whether a process trains in the folder now."""
        return is_held(self.folder)

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its last step: the report is the last file that it writes."""
        return (self.folder / REPORT).exists()

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that were saved completely, newest first. Damage since then is for `file_faults` to find."""
        return existing_checkpoints(self.folder)

    def saved_settings(self) -> dict:
        """The settings as nested dictionaries, where another version wrote them too: each under the name it has now.

        Raises:
            OSError, ValueError: the file cannot be read, or holds no settings.
        """
        path = self.folder / CONFIG
        try:
            found = parse_yaml(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML ({fault_of(error)})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: holds no settings")
        return renamed_sections(found)

    def settings(self) -> RunConfig:
        """The settings, checked.

        Raises:
            ValueError: the file holds something that this version does not know.
        """
        return command_line.load_settings(RunConfig, self.folder / CONFIG)

    def check_is_run(self, option: str) -> None:
        """Stop where the folder is not a run's.

        Args:
            option: the command-line option that named the folder, for the message.

        Raises:
            ValueError: the folder has no settings of a run.
        """
        if not self.folder.is_dir():
            raise ValueError(f"{option}: there is no folder {self.folder}{near_runs(self.folder)}")
        if not self.is_run:
            raise ValueError(f"{option}: {self.folder} is not the folder of a run: it has no {CONFIG}")


def near_runs(folder: Path) -> str:
    """Runs with names like that of a folder which is not there, as the end of a sentence; empty where there are none.

    They are looked for beside it, and where runs are written unless the settings say otherwise.
    """
    found = {
        run.name: run
        for place in (Path(OutputConfig().folder), folder.parent)
        if place.is_dir()
        for run in place.iterdir()
        if RunState(run).is_run
    }
    if not folder.name:
        return ""
    begins = sorted(name for name in found if name.startswith(folder.name))
    near = (begins or difflib.get_close_matches(folder.name, found) or _near_beginnings(folder.name, found))[:3]
    return f"; did you mean {' or '.join(typed(found[name]) for name in near)}?" if near else ""


def _near_beginnings(typed_name: str, names: Iterable[str]) -> list[str]:
    """The names that begin nearly as somebody has typed: `first run` for `frist`; the order of letters may be wrong."""
    if len(typed_name) < 3:
        return []
    beginnings = {name: name[: len(typed_name)] for name in sorted(names)}
    near = difflib.get_close_matches(typed_name, beginnings.values(), cutoff=0.7)
    return [name for name, beginning in beginnings.items() if beginning in near]


@dataclass(frozen=True, slots=True)
class FinishedRun(RunState):
    """The folder of a run that came to its end. `open` checks that.

    Construct it directly only where the report is known to exist.
    """

    @classmethod
    def open(cls, folder: Path, option: str, hint: str = "") -> "FinishedRun":
        """The finished run in a folder.

        Args:
            option: the command-line option that named the folder, for the messages.
            hint: a sentence on what else can be done with a run that has saved something, for the messages.

        Raises:
            ValueError: the folder is not a run's, or the run still trains or is unfinished.
        """
        run = cls(folder)
        run.check_is_run(option)
        hint = f"\n{hint}" if hint and run.checkpoints else ""
        if run.is_running:
            raise ValueError(f"{option}: {folder} still trains; come back when it is done{hint}")
        if not run.is_finished:
            way_on = beside("deepspeed", "train.py", "--resume", typed(folder))
            raise ValueError(f"{option}: {folder} is unfinished: it has no {REPORT}; to go on with it: {way_on}{hint}")
        return run

    def report(self) -> dict[str, Any]:
        """What the run measured of itself, from report.json.

        Raises:
            ValueError: the file holds no JSON object.
        """
        path = self.folder / REPORT
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: it holds no object")
        return found
