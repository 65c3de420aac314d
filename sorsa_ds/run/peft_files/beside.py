"""At the end of a run: what it has trained in PEFT's format, in the folder adapter/ beside its own files.

PEFT and vLLM load that folder as it is; this program goes on from its own files there.
"""

import os
from pathlib import Path

import torch

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.peft_format import peft_format
from sorsa_ds.model.new_tokens import table_rows
from sorsa_ds.model.peft_names import CONFIG, WEIGHTS
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.paths import ADAPTER, TOKENIZER
from sorsa_ds.run.peft_files.lora import plan_lora, write_lora
from sorsa_ds.run.peft_files.notes import lora_notes
from sorsa_ds.run.peft_files.own_kind import write_peft_adapter
from sorsa_ds.run.source import Source, open_trained
from sorsa_ds.runtime.console import note, say, tracked
from sorsa_ds.runtime.files import fsync, private_folder

_FILES = WEIGHTS, CONFIG
"""The files, in the order in which they come into place: the description is what others look for."""


def add_peft_files(run: Path, config: RunConfig, device: torch.device) -> None:
    """Put PEFT's files into a run's folder adapter/, if the settings ask for them; remove what lies there under their
    names otherwise, which is of an earlier end of the run.

    What stands in the way is said, and the files are left out: the run has its own by now.

    Args:
        run: the run's folder, with a finished adapter.
        device: where changes of weights are decomposed.
    """
    folder = run / ADAPTER
    try:
        for name in reversed(_FILES):
            (folder / name).unlink(missing_ok=True)
        if not config.output.peft_adapter:
            return
        trusted = config.loading.trust_remote_code
        # The settings name the model where it lies now; the description, where it lay when the run began.
        source = open_trained(RunState(run), folder, {}, config.model, trusted)
        fill = _FILL[peft_format(source.method)]
        with private_folder(folder / CONFIG) as private:
            made = private / ADAPTER
            made.mkdir()
            notes = fill(source, made, device)
            for name in _FILES:
                fsync(made / name)
                os.replace(made / name, folder / name)
        fsync(folder)
    except Exception as error:  # PEFT and the disk refuse in many ways, and the training must not be lost by it
        note(f"{folder} gets no files in PEFT's format: {error}")
        return
    for line in [*notes, *_token_notes(source)]:
        say(line)


def _fill_with_own_kind(source: Source, folder: Path, device: torch.device) -> list[str]:
    write_peft_adapter(source, folder)
    return []


def _fill_with_lora(source: Source, folder: Path, device: torch.device) -> list[str]:
    planned = plan_lora(source, None)
    write_lora(source, planned, folder, lambda names: tracked(names, len(names), "LoRA for PEFT", "tensor"), device)
    return lora_notes(source, planned)


_FILL = {"adapter": _fill_with_own_kind, "lora": _fill_with_lora}
"""Format of an export -> what fills a folder with it, and returns notes."""


def _token_notes(source: Source) -> list[str]:
    """What whoever loads the adapter has to do where training has added tokens."""
    if not source.described.new_tokens:
        return []
    return [
        f"Before PEFT loads {ADAPTER}/, the base model needs the rows of the new tokens: "
        f"model.resize_token_embeddings({table_rows(source.model)}, mean_resizing=False). Their tokenizer is "
        f"{ADAPTER}/{TOKENIZER}."
    ]
