"""What one command line of launch/analyze.py asks for, and whether a folder holds another analysis."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.adapter import TRAINED
from sorsa_ds.analysis.compute import DTYPES
from sorsa_ds.analysis.history import History, names_of, open_history
from sorsa_ds.config import RunConfig
from sorsa_ds.files import write_json

SETTINGS = "analysis.json"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. Options that are None were not given."""

    run: Sequence[Path]
    output: Path
    base: str | None = None
    workers: int | None = None
    dtype: str = "float64"
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """The command line, with its runs opened: name -> (folder, history). rank: of the compared subspaces."""

    options: Options
    output: Path
    runs: dict[str, tuple[Path, History]]
    rank: int

    def settle(self) -> None:
        """Write down what the output folder's rows are of.

        Raises:
            ValueError: those that are there are of another run under the same name, or were made with other settings.
        """
        path = self.output / SETTINGS
        trained = {name: history.source.described.files.get(TRAINED) for name, (_, history) in self.runs.items()}
        now = {"dtype": self.options.dtype, "subspace_rank": self.rank, "runs": trained}
        then = _read(path) if path.exists() else now
        for key, option in (("dtype", "--dtype"), ("subspace_rank", "--rank")):
            if then[key] != now[key]:
                raise ValueError(
                    f"--output: {self.output} was made with {option} {then[key]}, and this is {now[key]}; say so, or "
                    f"choose another folder"
                )
        for name, found in trained.items():
            if then["runs"].get(name, found) != found:
                raise ValueError(f"--output: {self.output} holds another run named {name}; choose another folder")
        write_json(path, now | {"runs": then["runs"] | trained})


def opened(options: Options) -> Request:
    """Open all runs before anything is computed.

    Raises:
        ValueError: a bad option, or a run that is unfinished or damaged.
    """
    for name in ("workers", "rank"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise ValueError(f"--{name}: {given} is no integer >= 1")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype: there is no {options.dtype!r}; there are {', '.join(DTYPES)}")
    folders = [run.expanduser().resolve() for run in options.run]
    runs = {name: (run, open_history(run, options.base)) for name, run in zip(names_of(folders), folders, strict=True)}
    output = options.output.expanduser().resolve()
    rank = options.rank or _rank(output, [history.source.config for _, history in runs.values()])
    return Request(options, output, runs, rank)


def _rank(output: Path, configs: list[RunConfig]) -> int:
    """What is not said: the rank of the rows that are there, else the largest of the runs' adapters."""
    if (output / SETTINGS).exists():
        return _read(output / SETTINGS)["subspace_rank"]
    adapted = [config.sorsa.rank for config in configs if config.method not in ("full", "partial")]
    return max(adapted, default=RunConfig().sorsa.rank)


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("dtype", "subspace_rank")} | {"runs": dict(found["runs"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not of an analysis of this program ({error})") from error
