"""Saving while training goes on: the state is copied to host memory and written by a thread.

Only a copy from host memory to host memory stands in the training's way; one from a GPU does not
(`sorsa_ds.run.checkpoint.host_copies`). No collective runs in the thread: at each later step the ranks agree, with
one number, whether all of them have written; then rank 0 makes the checkpoint valid.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds.run.checkpoint import folder
from sorsa_ds.run.checkpoint.manifest import Manifest
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.paths import CHECKPOINTS
from sorsa_ds.runtime import collectives, digest
from sorsa_ds.runtime.background import on_this_device
from sorsa_ds.runtime.files import write_atomic

T = TypeVar("T")


class CheckpointSaver:
    """Writes the checkpoints of one run. All methods are collective calls.

    Args:
        run: the run's folder, on a file system that all ranks share.
        keep: how many checkpoints stay.
        device: for the collectives.
        last: the checkpoint from which the run goes on; None of a new run.

    The attribute `last` is the newest valid checkpoint that this run has made or has gone on from.
    """

    def __init__(self, run: Path, keep: int, device: torch.device, last: Path | None):
        self._run, self._keep, self._device = run, keep, device
        self._pending: _Writing | None = None
        self.last = last

    @property
    def step_at_hand(self) -> int | None:
        """The step of the checkpoint that is being written, else of the newest one; None where there is none."""
        if self._pending is not None:
            return self._pending.manifest.progress.step
        return None if self.last is None else folder.step_of(self.last)

    def begin(self, tensors: dict[str, Tensor], wait: Callable[[], None], manifest: Manifest) -> None:
        """Start to write this rank's tensors. An earlier save must be finished.

        Args:
            wait: returns when the tensors hold what is to be written; they must not change from then on. The thread
                that writes calls it.

        Raises:
            ValueError: the folder cannot be made.
        """
        assert self._pending is None
        step = manifest.progress.step
        made = self._together(step, lambda: folder.make_temporary(self._run, step), on=0)
        [name] = collectives.gather_lists([made.name] if made else [])
        path = folder.rank_file(self._run / CHECKPOINTS / name, collectives.rank())
        self._pending = _Writing(path, tensors, wait, manifest)

    def mark_best(self) -> None:
        """Let the checkpoint that is being written, or else the newest one, be the best one from now on.

        Raises:
            ValueError: the disk refuses.
        """
        if self._pending is not None:
            self._pending.best = True
        elif self.last is not None:
            step = folder.step_of(self.last)

            def name() -> None:
                folder.name_best(self._run, step)
                folder.remove_older(self._run, step, self._keep)  # the best one until now may be due

            collectives.together(name, self._device, on=0)

    def poll(self) -> None:
        """Make the checkpoint valid if every rank has written its file; else nothing happens, and a later call does it.

        Raises:
            ValueError: a rank could not write; the earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        if collectives.total(float(self._pending.done()), self._device).item() == collectives.world_size():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint is valid, if one is being written.

        Raises:
            ValueError: a rank could not write; the earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        writing, self._pending = self._pending, None
        step, temporary = writing.manifest.progress.step, writing.path.parent

        def make_valid() -> None:
            self._check_shared(temporary, files)
            writing.manifest.files = dict(files)
            writing.manifest.write(temporary)
            folder.commit_checkpoint(temporary, step, self._keep, writing.best)

        try:
            self._together(step, writing.wait)
            files = collectives.gather_lists([(writing.path.name, {"bytes": writing.bytes, "digest": writing.digest})])
            self._together(step, make_valid, on=0)
        except (ValueError, collectives.PeerError):
            if collectives.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        self.last = folder.checkpoint_path(self._run, step)

    def _together(self, step: int, action: Callable[[], T], on: int | None = None) -> T | None:
        """Do something on every rank, or on rank `on` alone, and stop on all of them where it failed.

        A collective call. Returns the action's result; None on a rank that did not run it.

        Raises:
            ValueError: the action failed on this rank; the message says which checkpoint is still valid.
            PeerError: on the other ranks.
        """

        def tried() -> T:
            try:
                return action()
            except Exception as error:
                raise self._failed(step, error) from error

        return collectives.together(tried, self._device, on)

    def _failed(self, step: int, error: Exception) -> ValueError:
        kept = RunState(self._run).checkpoints
        still = f"{kept[0]} is still valid" if kept else "there is no earlier one"
        return ValueError(f"the checkpoint of step {step} was not saved: {error}; {still}")

    @staticmethod
    def _check_shared(written: Path, files: list[tuple[str, dict]]) -> None:
        absent = [name for name, _ in files if not (written / name).exists()]
        if absent:
            raise ValueError(f"{written}: {absent[0]} is not there; output.folder must be shared by all nodes")


class _Writing:
    """One rank's file of a checkpoint on its way to the disk, written by a thread from the making of this object on."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], wait: Callable[[], None], manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.bytes, self.digest, self.best = 0, "", False
        self._tensors, self._ready = tensors, wait
        self._error: Exception | None = None
        self._thread = threading.Thread(target=on_this_device(self._write), name="checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the thread has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the thread, and raise what went wrong in it."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        try:
            self._ready()
            # Without parents: a folder that was taken away is not made anew, since it may be another run's by now.
            write_atomic(self.path, lambda temporary: save_file(self._tensors, temporary), parents=False)
            self._tensors = {}
            self.bytes, self.digest = self.path.stat().st_size, digest.of_file(self.path)
        except Exception as error:
            self._error = error
