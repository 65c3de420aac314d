"""What of the tokenizer goes with a run's adapter, because exports and evaluations need it."""

import shutil
from pathlib import Path

import torch

from sorsa_ds.run.paths import ADAPTER, CHAT_TEMPLATE, TOKENIZER
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.files import write_text
from sorsa_ds.train.inputs import Inputs
from sorsa_ds.train.settings import RunSettings


def keep_chat_template(folder: Path, inputs: Inputs, device: torch.device) -> None:
    """Put the chat template that the settings ask for where exports and evaluations look for it. A collective call.

    Where they ask for none, one that an earlier beginning of the run has left there is removed.

    Args:
        folder: the run's.

    Raises:
        ValueError: the disk refuses; on every rank.
    """
    template, file = inputs.chat_template, folder / ADAPTER / CHAT_TEMPLATE

    def keep() -> None:
        if template is not None:
            file.parent.mkdir(exist_ok=True)
            write_text(file, template)
            return
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"{file}: cannot be removed ({error.strerror})") from error

    collectives.together(keep, device, on=0)


def keep_tokenizer(folder: Path, inputs: Inputs, settings: RunSettings) -> None:
    """Put the tokenizer with new tokens where exports and evaluations look for it. A collective call.

    Without new tokens, one that an earlier beginning of the run has left there is removed.

    Args:
        folder: the run's.

    Raises:
        ValueError: the disk refuses; on every rank.
    """
    place = folder / ADAPTER / TOKENIZER

    def keep() -> None:
        try:
            if place.exists():
                shutil.rmtree(place)
            if settings.new_tokens:
                inputs.tokenizer.save_pretrained(place)
        except OSError as error:
            raise ValueError(f"{place}: cannot be written ({error.strerror})") from error

    collectives.together(keep, settings.device, on=0)
