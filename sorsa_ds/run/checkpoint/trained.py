"""What a checkpoint of a run has trained, for whoever puts the model together from it instead of from the adapter."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sorsa_ds.model.adapter_file import INITIAL, file_of
from sorsa_ds.run.checkpoint.manifest import digest_of_initial, file_faults, read_manifest
from sorsa_ds.run.checkpoint.saved import SavedTensors
from sorsa_ds.run.paths import ADAPTER, run_of


def trained_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's tensors.

    Raises:
        ValueError: the checkpoint's description is missing or damaged.
    """
    return [checkpoint / name for name in sorted(read_manifest(checkpoint).files)]


def trained_values(checkpoint: Path) -> Callable[[str, torch.Size], Tensor]:
    """Gives a trained tensor of a checkpoint by name and shape, fp32 on the CPU, after a check of its files.

    Raises:
        ValueError: a file is missing or damaged, or the run's initial factors are not those of the checkpoint.
    """
    manifest = read_manifest(checkpoint)
    if faults := file_faults(checkpoint, manifest):
        raise ValueError("; ".join(faults))
    if digest_of_initial(run_of(checkpoint)) != manifest.initial_factors:
        raise ValueError(f"{file_of(run_of(checkpoint) / ADAPTER, INITIAL)} is missing or damaged")
    return SavedTensors([checkpoint / name for name in sorted(manifest.files)]).values
