"""What one command line of launch/analyze.py asks for, and whether a folder holds another analysis."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.adapter import TRAINED
from sorsa_ds.analysis.compute import DTYPES
from sorsa_ds.analysis.history import History, names_of, open_history
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


def opened(options: Options) -> Request:
    """Open all runs before anything is computed.

    Raises:
        ValueError: a bad option, a run that is unfinished or damaged, or an output folder that holds the analysis of
            another run under the same name, or one made with other settings.
    """
    for name in ("workers", "rank"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise ValueError(f"--{name}: {given} is no integer >= 1")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype: there is no {options.dtype!r}; there are {', '.join(DTYPES)}")
    folders = [run.expanduser().resolve() for run in options.run]
    runs = {name: (run, open_history(run, options.base)) for name, run in zip(names_of(folders), folders, strict=True)}
    rank = options.rank or max(history.source.config.sorsa.rank for _, history in runs.values())
    output = options.output.expanduser().resolve()
    _settle(output, runs, options.dtype, rank)
    return Request(options, output, runs, rank)


def _settle(output: Path, runs: dict[str, tuple[Path, History]], dtype: str, rank: int) -> None:
    """Write down what the folder's rows are of; or stop where those that are there are of something else."""
    path = output / SETTINGS
    now = {
        "dtype": dtype,
        "subspace_rank": rank,
        "runs": {name: history.source.described.files.get(TRAINED) for name, (_, history) in runs.items()},
    }
    if path.exists():
        try:
            then = json.loads(path.read_text(encoding="utf-8"))
            for key, option in (("dtype", "--dtype"), ("subspace_rank", "--rank")):
                if then[key] != now[key]:
                    raise ValueError(
                        f"--output: {output} was made with {option} {then[key]}, and this is {now[key]}; say so, or "
                        f"choose another folder"
                    )
            for name, found in now["runs"].items():
                if then["runs"].get(name, found) != found:
                    raise ValueError(f"--output: {output} holds another run named {name}; choose another folder")
            now["runs"] = then["runs"] | now["runs"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not of an analysis of this program ({error})") from error
    write_json(path, now)
