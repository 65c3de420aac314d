"""The command line of launch/export.py: its options, and which of them go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sorsa_ds.config.byte_size import read_bytes
from sorsa_ds.run.command_options import add_base_options, add_checkpoint_option
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = "Export a run: `python launch/export.py --run runs/NAME --format FORMAT --output FOLDER`."

Format = Literal["merged", "lora", "base", "adapter"]
Quantised = Literal["nf4", "nf4_double", "int8"]
"""Values of --quantize."""

AUTO = "auto"
"""The value of --dtype with which every tensor stays as the base model has it."""

DTYPES = AUTO, "float32", "bfloat16", "float16"
"""Values of --dtype, PyTorch's names; the command line is read before PyTorch is imported, which takes seconds."""

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
    checkpoint: str | None = None
    base: str | None = None
    dtype: str | None = None
    quantize: Quantised | None = None
    max_shard_size: str | None = None
    rank: int | None = None
    push_to_hub: str | None = None
    private: bool = False
    trust_remote_code: bool = False

    @property
    def shard_bytes(self) -> int:
        """The size of the largest file.

        Raises:
            ValueError: `--max_shard_size` is not a size such as 5GB.
        """
        return read_bytes(self.max_shard_size or MAX_SHARD_SIZE, "--max_shard_size", "write it as 5GB or 500MB")


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. `--help`, and what argparse refuses, end the process."""
    parser = OptionParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the run folder that launch/train.py wrote, or one of its checkpoints")
    add_checkpoint_option(parser)
    add(
        "--format", choices=get_args(Format), required=True,
        help="merged: a plain Hugging Face model; lora: for the untouched base model, in PEFT's format; "
             "base: over a quantised residual, the model on which the LoRA is exact; "
             "adapter: U, s and V themselves, for sorsa_ds.load_adapter",
    )  # fmt: skip
    add("--output", type=Path, required=True, help="folder to make; it must not hold anything")
    add_base_options(parser, code=", where the run used it, and copy it along")
    add("--dtype", choices=DTYPES, help="merged, base: dtype of the weights (auto: the base's)")
    add(
        "--quantize", choices=get_args(Quantised),
        help="merged: in 4 or 8 bits, for transformers and bitsandbytes",
    )  # fmt: skip
    add("--max_shard_size", help=f"merged, base: largest file, as 500MB (default: {MAX_SHARD_SIZE})")
    add("--rank", type=int, help="lora: cut it to this rank (default: twice the trained one, exact)")
    add("--push_to_hub", metavar="NAME", help="publish the folder as this model")
    add("--private", action="store_true", help="with --push_to_hub: only you can see the model")
    return Options(**vars(parser.parse_args(argv)))


def check_options(options: Options) -> None:
    """Stop at an option that means nothing.

    Raises:
        ValueError: naming what it goes with.
    """
    for name, fitting in _GOES_WITH.items():
        if getattr(options, name) is not None and options.format not in fitting:
            raise ValueError(f"--{name} goes with --format {' or '.join(fitting)}, not with {options.format}")
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"--rank {options.rank}: a LoRA has at least rank 1")
    if options.private and not options.push_to_hub:
        raise ValueError("--private goes with --push_to_hub")
