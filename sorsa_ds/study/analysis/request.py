"""What an analysis is asked for: its opened runs, and whether the output folder holds another analysis."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sorsa_ds.config.declare import check_count
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import TRAINED
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.study.analysis.history import names_of
from sorsa_ds.study.analysis.options import DTYPES, Options
from sorsa_ds.study.analysis.runs import Run

SETTINGS = "analysis.json"


@dataclass(frozen=True, slots=True)
class Request:
    """The options with their runs opened.

    rank: the rank of the leading subspaces that are compared.
    """

    options: Options
    output: Path
    runs: list[Run]
    rank: int

    def claim_output(self) -> None:
        """Write into the output folder which runs and settings its rows are of.

        Raises:
            ValueError: the rows that are there are of another run with the same name, or were made with other settings.
        """
        path = self.output / SETTINGS
        trained = {run.name: _digest(run) for run in self.runs}
        now: dict[str, Any] = {"dtype": self.options.dtype, "subspace_rank": self.rank, "runs": trained}
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


def open_request(options: Options) -> Request:
    """Check the options and open all runs, before anything is computed.

    Raises:
        ValueError: an option is bad, or a run is unfinished or damaged.
    """
    for name in ("workers", "rank"):
        if (given := getattr(options, name)) is not None:
            check_count(f"--{name}", given, most=2**16)
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype: there is no {options.dtype!r}; there are {', '.join(DTYPES)}")
    folders = [run.expanduser().resolve() for run in options.run]
    output = options.output.expanduser().resolve()
    for folder in folders:
        if output.is_relative_to(folder):
            raise ValueError(f"--output: {output} is in the folder of a run, {folder}; choose another folder")
    named = zip(names_of(folders), folders, strict=True)
    runs = [Run.of(name, folder, options.base, options.trust_remote_code) for name, folder in named]
    then = _read(output / SETTINGS) if (output / SETTINGS).exists() else None
    if then is not None:
        runs = _named_as_before(runs, then["runs"])
    # Without --rank it is that of the rows that are there, or else the largest rank of the runs' adapters.
    rank = options.rank or (_rank(runs) if then is None else then["subspace_rank"])
    return Request(options, output, runs, rank)


def _named_as_before(runs: list[Run], then: dict[str, str | None]) -> list[Run]:
    """The runs, each with the name that its rows in the table have, where it has rows already."""
    taken, named = {run.name for run in runs}, []
    for run in runs:
        name = run.name
        if then.get(name) != _digest(run):
            name = next((old for old, of in then.items() if of and of == _digest(run) and old not in taken), name)
        taken.add(name)
        named.append(replace(run, name=name))
    return named


def _digest(run: Run) -> str | None:
    """Digest of what the run has trained, by which runs are told apart."""
    return run.history.source.described.files.get(TRAINED)


def _rank(runs: list[Run]) -> int:
    sources = [run.history.source for run in runs if method_of(run.config).has_rank]
    return max((target.rank for source in sources for target in source.targets), default=RunConfig().adapter.rank)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("dtype", "subspace_rank")} | {"runs": dict(found["runs"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not of an analysis of this program ({error})") from error
