"""While training: the trained tensors of the analysed linears, stored every so many steps.

Rank 0 gathers copies of the fp32 masters, which takes one pass over them, and writes them while training goes on.
"""

import re
import threading
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from sorsa_ds import comm
from sorsa_ds.config import RunConfig, SorsaConfig
from sorsa_ds.console import note
from sorsa_ds.engine import SorsaEngine
from sorsa_ds.files import write_atomic
from sorsa_ds.run_paths import SNAPSHOTS
from sorsa_ds.save_factors import gathered
from sorsa_ds.surgery import Target, check_all_match, matches, select

_NAME = re.compile(r"step-(\d{6,})\.safetensors")


def stored_linears(model: nn.Module, config: RunConfig) -> list[Target]:
    """The linears that `analysis.layers` names, in module order.

    Args:
        model: the base model; it needs no memory.

    Raises:
        ValueError: a pattern matches none of the adapted linears; with what there is.
    """
    adapted = select(model, SorsaConfig(rank=1) if config.method == "full" else config.sorsa)
    wanted = config.analysis.layers
    if wanted == "all":
        return adapted
    patterns = [wanted] if isinstance(wanted, str) else wanted
    check_all_match("analysis.layers", patterns, [target.name for target in adapted])
    chosen = [target for target in adapted if any(matches(target.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError("analysis.layers: the list is empty; `all` are all adapted linears, analysis.every=0 is none")
    return chosen


def path_of(run: Path, step: int) -> Path:
    """The snapshot after `step` optimizer steps."""
    return run / SNAPSHOTS / f"step-{step:06d}.safetensors"


def existing(run: Path) -> dict[int, Path]:
    """A run's snapshots by step, in order."""
    folder = run / SNAPSHOTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {step: path_of(run, step) for step in sorted(int(found[1]) for n in names if (found := _NAME.fullmatch(n)))}


class Snapshots:
    """The snapshots of one run. All methods are collective calls.

    Args:
        run: its folder.
        linears: whose tensors are stored.
        steps_done: what a run that was killed has stored of later steps is removed.
    """

    def __init__(self, run: Path, engine: SorsaEngine, linears: Iterable[Target], steps_done: int):
        self._run, self._engine = run, engine
        prefixes = tuple(f"{target.name}." for target in linears)
        # A bias is trained with full fine-tuning alone, and is no part of the matrix.
        self._names = [n for n in engine.trained_shapes if n.startswith(prefixes) and not n.endswith(".bias")]
        self._writing: threading.Thread | None = None
        if comm.rank() == 0:
            for step, path in existing(run).items():
                if step > steps_done:
                    path.unlink()

    def take(self, step: int) -> None:
        """Store the tensors as they are now; returns when they are gathered.

        What goes wrong on the disk is told, and training goes on.
        """
        self.finish()
        whole = gathered(self._engine, self._names)
        if comm.rank() == 0:
            self._writing = threading.Thread(target=_write, args=(path_of(self._run, step), whole), name="snapshot")
            self._writing.start()

    def finish(self) -> None:
        """Wait until the last snapshot is on the disk."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None


def _write(path: Path, whole: dict[str, Tensor]) -> None:
    try:
        write_atomic(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
    except ValueError as error:
        note(str(error))
