"""The options of launch/export.py, and which of them go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sorsa_ds.config.byte_size import read_bytes

Format = Literal["merged", "lora", "base", "adapter"]

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Values of --dtype; None: every tensor as the base model has it."""

MAX_SHARD_SIZE = "5GB"
_GOES_WITH: dict[str, tuple[Format, ...]] = {
    "dtype": ("merged", "base"), "max_shard_size": ("merged", "base"), "rank": ("lora",), "quantize": ("merged",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. Options that are None were not given."""

    run: Path
    format: Format
    output: Path
    base: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    max_shard_size: str | None = None
    rank: int | None = None
    push_to_hub: str | None = None
    private: bool = False

    @property
    def shard_bytes(self) -> int:
        """The size of the largest file.

        Raises:
            ValueError: `--max_shard_size` is not a size such as 5GB.
        """
        return read_bytes(self.max_shard_size or MAX_SHARD_SIZE, "--max_shard_size", "write it as 5GB or 500MB")


def check_options(options: Options) -> None:
    """Stop at an option that means nothing.

    Raises:
        ValueError: naming what it goes with.
    """
    for name, fitting in _GOES_WITH.items():
        if getattr(options, name) is not None and options.format not in fitting:
            raise ValueError(f"--{name} goes with --format {' or '.join(fitting)}, not with {options.format}")
    if options.private and not options.push_to_hub:
        raise ValueError("--private goes with --push_to_hub")
