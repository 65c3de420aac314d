"""What decides how busy a GPU is, counted exactly on a CPU: kernels, host syncs, bytes of masks and of logits.

    python benchmarks/counts.py

Kernels are the operators that PyTorch dispatches in mixed precision, in a micro-batch that is not the first of its
step. Host syncs are those of a step of four micro-batches of a real run on two ranks, on the stage that has most of
them. A tensor that such a step left in a cycle would stay on the GPU until Python collects its garbage. The last line
is one JSON object; only its `reorthonormalize_seconds_per_layer` is timed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.helpers.common import TINY_LLAMA, in_ranks, say, write_small_llama
from benchmarks.helpers.kernels import block_kernels, kept_ratio, linear_kernels
from benchmarks.helpers.logit_bytes import logit_bytes
from benchmarks.helpers.mask_bytes import mask_bytes
from benchmarks.helpers.padding import imbalance, like_metamath
from benchmarks.helpers.reorthonormalize_time import reorthonormalize_seconds_per_layer
from sorsa_ds.data.batches import collate
from sorsa_ds.train.loss import LossOptions
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.padding import Padding

STAGES = ("stage0", "zero2", "zero3")
CHUNK, VOCABULARY, LENGTH = 16, 1024, 77
"""Of the loss whose logits are counted; the vocabulary and the length are no other size of its model."""
POSITIONS = 512
"""`train.micro_batch_tokens` of the balance that is counted."""


def main() -> None:
    """Count everything, print a table and the JSON line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    steps = _steps()
    worst = max(steps.values(), key=lambda step: step["host_syncs"])
    balance = [imbalance(like_metamath(8192), 8, 128, POSITIONS, each_pass=each) for each in (True, False)]
    found = {
        "kernels_linear": linear_kernels("sorsa"),
        "kernels_linear_zero3": linear_kernels("sorsa", kept=False),
        "kernels_linear_lora": linear_kernels("lora"),
        "kernels_block": block_kernels("sorsa"),
        "kernels_block_zero3": block_kernels("sorsa", kept=False),
        "kernels_block_lora": block_kernels("lora"),
        "host_syncs_step": worst["host_syncs"],
        "mask_bytes": llama_mask_bytes(),
        "blocking_signal_collectives": max(step["blocking_signals"] for step in steps.values()),
        "cyclic_tensors_step": max(step["cyclic_tensors"] for step in steps.values()),
        "kept_bytes_ratio": kept_ratio(),
        "logit_bytes_ratio": logit_ratio(),
        "imbalance_8_ranks": balance[0],
        "imbalance_8_ranks_a_step": balance[1],
        "reorthonormalize_seconds_per_layer": reorthonormalize_seconds_per_layer(128, 64),
    }
    for key, value in found.items():
        say(f"{key:<36} {value:.4g}" if isinstance(value, float) else f"{key:<36} {value}")
    say("host syncs of a step: " + "; ".join(f"{stage}: {step['by']}" for stage, step in steps.items()))
    print(json.dumps(found))


def _steps() -> dict[str, dict]:
    """What was counted in a step, by the name of its DeepSpeed JSON."""
    with tempfile.TemporaryDirectory() as folder:
        write_small_llama(Path(folder) / "model")
        return {stage: in_ranks("benchmarks.workers.counts", 2, stage, folder) for stage in STAGES}


def llama_mask_bytes() -> int:
    """Bytes of masks that a Llama makes for a micro-batch that is padded on the right."""
    return mask_bytes(_llama(), _padded(), LossOptions(Padding.POSITIONS))


def logit_ratio() -> float:
    """Peak bytes of logits, their gradients among them, over the 12 for each logit of a chunk that a plan counts."""
    options = LossOptions(Padding.POSITIONS, chunk=CHUNK)
    return logit_bytes(_llama(), _padded(), options, VOCABULARY) / (12 * CHUNK * VOCABULARY)


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA | {"vocab_size": VOCABULARY}))


def _padded() -> MicroBatch:
    """Two sequences of different lengths, of which all but the first tokens are learned."""
    examples = [{"input_ids": _ids(length), "labels": _ids(length)} for length in (LENGTH, LENGTH // 2)]
    return MicroBatch.of(collate(examples, 0))


def _ids(length: int) -> Tensor:
    return torch.randint(1, 100, (length,))


if __name__ == "__main__":
    main()
