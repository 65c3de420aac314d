"""The interface between the evaluation command and a task, from both sides."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sorsa_ds.data.batches import pad_token_id
from sorsa_ds.evaluate.backends.likelihood import Likelihood
from sorsa_ds.model.generation import Prompt, Receive, Transformers

Emit = Callable[[dict], None]
"""A function that takes the record of a sample: `id`, `correct`, `tokens`, and the task's own entries.

`correct` is None in a task that has no right and wrong.
"""

Generate = Callable[[list[Prompt], Receive], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known before a model is loaded.

    folder: the model's tokenizer. positions: the most tokens that it takes; None: any number. bare: whether a chat
    template makes the prompts, with all the special tokens that they need. output: the folder of the results, which
    need not exist yet; None: nothing but what the command writes is written.
    """

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    positions: int | None
    bare: bool = False
    output: Path | None = None


class Engine(Protocol):
    """A loaded model, as tasks use it."""

    def generator(self) -> Generate:
        """The function that writes answers."""
        ...

    def likelihood(self) -> Likelihood:
        """The object that measures likelihoods."""
        ...


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
        vocabulary = self.model.config.get_text_config().vocab_size
        pad = pad_token_id(self.setting.tokenizer, vocabulary)
        return Likelihood(self.model, self.device, pad, self.autocast)


class Task(Protocol):
    """What an evaluation is of. `ids` has all samples, in the order of the data."""

    ids: list[str]

    def digest(self) -> str:
        """Digest of all that the model is given and that it is judged by."""
        ...

    def notes(self) -> list[str]:
        """Sentences for the user, printed before work begins."""
        ...

    def start(self, engine: Engine) -> None:
        """Get ready to work with a loaded model."""
        ...

    def batches(self, done: Collection[str], size: int) -> list[Any]:
        """The work that is left, the same list on every rank. A collective call."""
        ...

    def work(self, batch: Any, emit: Emit) -> None:
        """Do one batch, and emit a record for each of its samples."""
        ...

    def results(self, records: list[dict]) -> dict:
        """The figures, made from all records in the order of `ids`."""
        ...

    def rows(self, results: dict) -> list[tuple[str, str]]:
        """The figures as the lines of a printed table: name and text."""
        ...

    def close(self) -> None:
        """End what `start` has started."""
        ...
