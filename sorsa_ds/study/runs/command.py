"""The command `runs`: a table, or JSON, of what runs there are."""

import time
from dataclasses import asdict

from sorsa_ds.runtime.console import grid, on_one_line, say
from sorsa_ds.runtime.json_text import finite_json
from sorsa_ds.runtime.words import cut
from sorsa_ds.study.runs.index import RunFacts, runs_in
from sorsa_ds.study.runs.options import RunsOptions

HEADINGS = ("run", "state", "method", "model", "steps", "loss", "best held-out", "last active")
_MODEL, _WHY = 32, 160
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def list_runs(options: RunsOptions) -> None:
    """Print the runs of a folder.

    Raises:
        ValueError: the folder cannot be read.
    """
    found = runs_in(options.folder)
    if options.as_json:
        print(finite_json([asdict(one) for one in found], indent=2))
        return
    if not found:
        say(f"{options.folder} holds no runs.")
        return
    now = time.time()
    say(grid([HEADINGS, *(_cells(one, now) for one in found)]))
    for one in found:
        if one.why and one.state != "finished":
            say(on_one_line(f"{one.name}: {one.state}: {cut(one.why, _WHY)}"))


def _cells(facts: RunFacts, now: float) -> tuple[str, ...]:
    state = f"{facts.state}, early" if facts.state == "finished" and facts.why else facts.state
    planned = "" if facts.planned is None else f" / {facts.planned}"
    best = "" if facts.eval_loss is None else f"{facts.eval_loss:.4f} @ {facts.eval_step}"
    loss = "" if facts.loss is None else f"{facts.loss:.4f}"
    model = "" if facts.model is None else _end_of(facts.model)
    ago = f"{_span(now - facts.last_active)} ago" if facts.last_active else ""
    return facts.name, state, facts.method or "", model, f"{facts.steps}{planned}", loss, best, ago


def _end_of(model: str) -> str:
    """The last part of a model's path or name, cut where it is long."""
    return cut(model.rstrip("/").rpartition("/")[2], _MODEL)


def _span(seconds: float) -> str:
    """A time in its largest unit, rounded down."""
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= size), ("s", 1))
    return f"{max(0, int(seconds // size))} {unit}"
