"""Taking snapshots while a run trains.

Rank 0 gathers copies of the fp32 masters, in one pass over what is stored, and writes them while training goes on.
"""

import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.gather import gathered
from sorsa_ds.run.snapshots import existing_snapshots, snapshot_path
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.files import write_atomic


class SnapshotRecorder:
    """Takes the snapshots of one run. Making it is a collective call.

    Args:
        run: the run's folder.
        under: how the names of the trained tensors begin that are stored.
        steps_done: finished steps of the run; what a run that was killed has stored of later steps is removed.

    Raises:
        ValueError: a snapshot of a later step cannot be removed.
    """

    def __init__(self, run: Path, engine: SorsaEngine, under: Iterable[str], steps_done: int):
        self._run, self._engine = run, engine
        prefixes = tuple(under)
        # Full fine-tuning trains biases too, which are no part of the matrix.
        self._names = [n for n in engine.trained_shapes if n.startswith(prefixes) and not n.endswith(".bias")]
        self._writing: threading.Thread | None = None
        collectives.together(lambda: _remove_after(run, steps_done), engine.device, on=0)

    def take(self, step: int) -> None:
        """Store the tensors as they are now; returns when they are gathered. A collective call.

        If the file cannot be written, a warning is printed and training continues.
        """
        self.finish()
        whole = gathered(self._engine, self._names)
        if collectives.rank() == 0:
            self._writing = threading.Thread(
                target=_write, args=(snapshot_path(self._run, step), whole), name="snapshot"
            )
            self._writing.start()

    def finish(self) -> None:
        """Wait until the last snapshot is on the disk."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None


def _remove_after(run: Path, steps_done: int) -> None:
    for step, path in existing_snapshots(run).items():
        if step > steps_done:
            try:
                path.unlink()
            except OSError as error:
                raise ValueError(f"{path}: of a later step, and cannot be removed ({error.strerror})") from error


def _write(path: Path, whole: dict[str, Tensor]) -> None:
    # Without parents: a run's folder that was taken away is not made anew, since it may be another run's by now.
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, partial(save_file, whole, metadata={"format": "pt"}), parents=False)
    except (OSError, ValueError) as error:
        note(str(error))
