"""The beginning of a new run: its model is checked against the pre-trained one, and what it begins with is kept."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.load import AdaptedModel
from sorsa_ds.model.numerics import Numerics
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.train.adapter import begin_adapter
from sorsa_ds.train.loss import LossOptions
from sorsa_ds.train.start_check import check_beginning


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a run begins with.

    numerics: what decides the base model's numbers besides its weights; the adapter will say it.
    new_tokens: the ids of `data.new_tokens`, which the adapter will say too.
    """

    loaded: AdaptedModel
    numerics: Numerics
    new_tokens: dict[str, int]

    def checked_and_kept(
        self,
        engine: SorsaEngine,
        probe: dict[str, Tensor],
        config: RunConfig,
        options: LossOptions,
        sequence: SequenceParallel,
        run: Path,
    ) -> tuple[float, float]:
        """Check the model at step 0 against the pre-trained one, and keep its initial factors. A collective call.

        Args:
            probe: this rank's first micro-batch, the same on all ranks that compute it together.
            options: how the run computes losses.
            sequence: the ranks that compute a sequence together.
            run: the run's folder.

        Returns:
            The losses that `check_start` finds.

        Raises:
            ValueError: the model is not causal or not the pre-trained one, or the folder cannot be written.
        """
        losses = check_beginning(engine, self.loaded, probe, config, options, sequence)
        begin_adapter(run, engine, config, self.loaded, self.numerics, self.new_tokens)
        return losses
