"""What the user of an adapter in PEFT's format should know, a sentence or two each."""

from collections.abc import Sequence

import torch

from sorsa_ds.run.peft_files.lora import LoraPlan
from sorsa_ds.run.source import Source
from sorsa_ds.sorsa.residual_storage import describe_storage

BY_PARAMETER = (
    "This LoRA adapts experts as parameters (PEFT's target_parameters), in the layout of PEFT 0.19 and newer. vLLM "
    "serves that for some models only; for others it has left the experts out without a word or read them wrongly "
    "(vllm-project/vllm#41384, #52198): compare its answers with PEFT's, or serve `--format merged`."
)
"""What the user of a LoRA on experts should know of PEFT and vLLM."""

FOLLOWED = (
    "Loading it, PEFT warns that patterns of ranks matched no module and were ignored: it means modules alone, and "
    "follows these patterns for parameters."
)
"""What the user should know of a LoRA that has patterns for parameters."""

OVER_QUANTISED = (
    "This LoRA holds exactly what training changed. It is exact on the model that `--format base` writes, from which "
    "training began; on the pre-trained model itself it is the same change, without the error of the quantisation that "
    "training saw."
)
"""What it means for a LoRA that training held the residual quantised."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (MaxLoRARanks in vllm/config/lora.py)."""


def lora_notes(source: Source, planned: LoraPlan) -> list[str]:
    """What the user of this LoRA should know."""
    notes = [BY_PARAMETER] * planned.adapts_parameters + [FOLLOWED] * planned.has_parameter_ranks
    notes.append(served_by_vllm(planned.rank, planned.saved.modules) + ".")
    if source.storage.quantised:
        notes.append(quantised_note(source, OVER_QUANTISED))
    elif source.precision.residual_dtype != torch.float32:
        notes.append(
            "Training held the residual weights in bf16. This LoRA is the exact change of the base model's own "
            "weights, without that rounding; `--format merged` has it."
        )
    if hasattr(source.model.config, "rescale_every"):
        notes.append(
            "Load the base model with rescale_every=0: at inference RWKV halves some of its weights in place, and "
            "would not halve what a LoRA adds to them."
        )
    return notes


def quantised_note(source: Source, consequence: str) -> str:
    """How training held the residual, and what follows from it."""
    return f"Training held the residual quantised ({describe_storage(source.described.residual)}). {consequence}"


def served_by_vllm(rank: int, saved: Sequence[str] = ()) -> str:
    """A line on vLLM, which takes only some ranks, and no modules that were trained whole (`saved`)."""
    if saved:
        return f"vLLM takes no adapter with modules_to_save ({', '.join(saved[:3])}): serve --format merged"
    fitting = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if fitting is None:
        return (
            f"vLLM takes LoRA ranks up to {VLLM_RANKS[-1]}, this one has {rank}: cut it with launch/export.py "
            f"--format lora --rank {VLLM_RANKS[-1]}"
        )
    return f"vLLM serves it with --enable-lora --max-lora-rank {fitting} (its default is 16)"
