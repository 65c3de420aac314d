"""What stops a run whose numbers are none any more."""

import math
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.run.checkpoint.keeper import CheckpointKeeper
from sorsa_ds.run.finished import RunState


@dataclass(frozen=True, slots=True)
class StopUnlessFinite:
    """Stops a run where a number that it has measured is NaN or infinite.

    folder: the run's. learning_rate: `train.learning_rate`.
    """

    keeper: CheckpointKeeper
    folder: Path
    learning_rate: float

    def __call__(self, number: float | None, what: str, step: int) -> None:
        """Stop where a measured number, which is the same on all ranks, is NaN or infinite. A collective call.

        A save that is under way is finished first: what it holds is from before that number.

        Raises:
            ValueError: on every rank alike, with the last checkpoint.
        """
        if number is None or math.isfinite(number):
            return
        self.keeper.finish_saving()
        saved = RunState(self.folder).checkpoints
        kept = f"the last checkpoint is {saved[0]}" if saved else "nothing was saved before it"
        raise ValueError(
            f"the {what} is {number} at step {step}: lower train.learning_rate (now {self.learning_rate}) or look at "
            f"the data of that step; {kept}"
        )
