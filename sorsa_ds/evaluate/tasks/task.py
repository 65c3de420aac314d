"""What the command needs of a task, and what a task needs of the command."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sorsa_ds.data.batches import pad_token_id
from sorsa_ds.evaluate.backends.generation import Prompt, Receive, Transformers
from sorsa_ds.evaluate.backends.likelihood import Likelihood

Emit = Callable[[dict], None]
"""Takes the record of a sample: `id`, `correct` (None where nothing can be), `tokens`, and the task's own."""

Generate = Callable[[list[Prompt], Receive], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known before a model is loaded. positions: how many tokens it takes; None: any number."""

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    positions: int | None

    @property
    def pad(self) -> int:
        """The token to fill batches up with."""
        return pad_token_id(self.tokenizer)


class Engine(Protocol):
    """A loaded model, as tasks use it."""

    def generator(self) -> Generate:
        """To write answers with."""

    def likelihood(self) -> Likelihood:
        """To measure with."""


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A model of transformers on this rank's device."""

    model: PreTrainedModel
    setting: Setting
    device: torch.device
    autocast: bool

    def generator(self) -> Transformers:
        return Transformers(self.model, self.setting.tokenizer, self.device)

    def likelihood(self) -> Likelihood:
        return Likelihood(self.model, self.device, self.setting.pad, self.autocast)


class Task(Protocol):
    """One evaluation. `ids`: of all samples, in the order of the data."""

    ids: list[str]

    def digest(self) -> str:
        """Of all that the model is given, and that it is judged by."""

    def notes(self) -> list[str]:
        """What to know before it begins, a sentence each."""

    def start(self, engine: Engine) -> None:
        """Get ready to work."""

    def batches(self, done: Collection[str], size: int) -> list[Any]:
        """The work that is left, alike on every rank. A collective call."""

    def work(self, batch: Any, emit: Emit) -> None:
        """Do a batch; a record for each of its samples."""

    def results(self, records: list[dict]) -> dict:
        """The figures, from all records in the order of `ids`."""

    def rows(self, results: dict) -> list[tuple[str, str]]:
        """The figures for people."""

    def close(self) -> None:
        """End what was started."""
