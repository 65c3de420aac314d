"""Answers from vLLM, where it is installed and asked for: `--backend vllm`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from sorsa_ds.model.generation import Answer, Prompt, Receive
from sorsa_ds.runtime.console import say

PROMPTS_A_CALL = 512
"""Number of prompts that vLLM is given at once; an interruption loses as many answers at the most."""


def tensor_parallel_size(folder: Path, gpus: int, trust_remote_code: bool = False) -> int:
    """The most GPUs, up to `gpus`, among which vLLM can cut the model: they have to divide its attention heads, and
    its key and value heads, or be a multiple of these. Fewer than there are is said.

    Args:
        folder: a model in the format of transformers.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = next(n for n in range(gpus, 0, -1) if heads % n == 0 and (keys % n == 0 or n % keys == 0))
    if size < gpus:
        say(f"vLLM takes {size} of {gpus} GPUs: {heads} attention heads and {keys} key heads do not divide among more.")
    return size


class Vllm:
    """Generates with vLLM on all GPUs of this machine, from one process.

    Args:
        folder: a plain model in the format of transformers.
        dtype: the dtype of weights and products.
        end_tokens: ids of the tokens that end an answer.

    Raises:
        ValueError: vLLM is not installed, or it refuses the model.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None, end_tokens: list[int], trust_remote_code: bool):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ValueError(
                "--backend vllm: the package vllm is not installed here; pip install vllm into an environment of its "
                "own (it pins another torch), or leave --backend out"
            ) from error
        self._parameters = lambda prompt: SamplingParams(
            temperature=prompt.temperature, seed=prompt.seed if prompt.temperature else None, max_tokens=prompt.limit,
            stop_token_ids=end_tokens, skip_special_tokens=False,
        )  # fmt: skip
        self._ends = set(end_tokens)
        try:
            gpus = tensor_parallel_size(folder, max(1, torch.cuda.device_count()), trust_remote_code)
            self._model = LLM(
                model=str(folder), dtype=str(dtype).removeprefix("torch."), trust_remote_code=trust_remote_code,
                tensor_parallel_size=gpus, generation_config="vllm",
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--backend vllm: {folder}: {error}") from error

    def __call__(self, batch: Sequence[Prompt], receive: Receive) -> None:
        """Answer all prompts; vLLM makes its own batches of them."""
        made = self._model.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in batch],
            [self._parameters(prompt) for prompt in batch],
            use_tqdm=False,
        )
        for prompt, output in zip(batch, made, strict=True):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            ended = answer.finish_reason == "stop"
            receive(prompt, Answer(ids[:-1] if ended and ids and ids[-1] in self._ends else ids, ended))
