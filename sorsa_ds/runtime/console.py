"""What a person sees while a command runs: printed lines and progress bars, as a rule from rank 0 only."""

import logging
import sys
import warnings
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from sorsa_ds.runtime import collectives


def say(text: str) -> None:
    """Print a line on rank 0, above a running progress bar."""
    if collectives.rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def note(text: str) -> None:
    """Print a line on this rank, whichever it is, to stderr and with the rank in front."""
    tqdm.write(f"[rank {collectives.rank()}] {text}", file=sys.stderr)


def bar(total: float, what: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar with an estimate of the time left. It is shown on rank 0 only."""
    hidden = collectives.rank() != 0
    percent = "{l_bar}{bar}| [{elapsed}<{remaining}]" if unit == "%" else None
    return tqdm(
        total=total, initial=done, desc=what, unit=unit, disable=hidden, dynamic_ncols=True, file=sys.stderr,
        bar_format=percent,
    )  # fmt: skip


def tracked(items: Iterable, total: int, what: str, unit: str) -> Iterable:
    """Iterate over items behind a progress bar that counts them."""
    with bar(total, what, unit) as progress:
        for item in items:
            yield item
            progress.update()


def tracked_by_cost(items: Sequence, costs: Sequence[float], what: str) -> Iterable:
    """Iterate over items of unequal cost behind a progress bar that shows the percentage of the total cost done."""
    with bar(sum(costs), what, "%") as progress:
        for item, cost in zip(items, costs, strict=True):
            yield item
            progress.update(cost)


def quiet_libraries() -> None:
    """Silence what libraries print below the level of a warning, so that the console belongs to the run."""
    import datasets
    import deepspeed
    import transformers

    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def table(rows: list[tuple[str, str]]) -> str:
    """Lines of two aligned columns, from (name, value) pairs."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
