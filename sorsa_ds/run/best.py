"""What the evaluations of a run have shown so far: the lowest held-out loss, and for how long it has not fallen."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from sorsa_ds.config.declare import NonNegativeInt

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """The account of a run's evaluations after its first step; that at step 0 is the pre-trained model's.

    step: the step after which the held-out loss was lowest; 0 before the first evaluation.
    loss: the lowest held-out loss, nats per token; None before the first evaluation.
    reference: the loss that a later one must undercut by `evaluation.min_delta` to count as an improvement.
    waited: how many evaluations in a row, up to the last, have brought no improvement.
    seen: the step of the last evaluation. It is made again when a run goes on from a checkpoint of that step.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: NonNegativeInt = 0
    loss: Finite | None = None
    reference: Finite | None = None
    waited: NonNegativeInt = 0
    seen: NonNegativeInt = 0

    def after(self, step: int, loss: float, min_delta: float) -> "BestSoFar":
        """The account with one more evaluation. One of a step that was counted already changes nothing.

        Args:
            step: finished steps, 1 or more. loss: finite.
        """
        if step <= self.seen:
            return self
        improved = self.reference is None or loss < self.reference - min_delta
        found = replace(
            self,
            seen=step,
            reference=loss if improved else self.reference,
            waited=0 if improved else self.waited + 1,
        )
        return replace(found, step=step, loss=loss) if self.loss is None or loss < self.loss else found

    def after_all(self, lines: Iterable[dict], min_delta: float) -> "BestSoFar":
        """The account with the evaluations among lines of metrics.jsonl.

        A checkpoint is as a rule saved before the evaluation after its step is made, so its own account lacks that one.

        Args:
            lines: in the order of their steps.
        """
        found = self
        for line in lines:
            if "eval_loss" in line and line["step"] > 0:
                found = found.after(line["step"], line["eval_loss"], min_delta)
        return found

    def has_waited(self, patience: int) -> bool:
        """Whether so many evaluations in a row, 1 or more, were in vain; never where `patience` is 0."""
        return 0 < patience <= self.waited
