"""Greedy answers from vLLM, where it is installed and asked for: `--backend vllm`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sorsa_ds.evaluate.backends.generation import Answer, Prompt, Receive

PROMPTS_A_CALL = 512
"""Number of prompts that vLLM is given at once; an interruption loses as many answers at the most."""


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
        self._parameters = lambda limit: SamplingParams(
            temperature=0.0, max_tokens=limit, stop_token_ids=end_tokens, skip_special_tokens=False
        )
        self._ends = set(end_tokens)
        try:
            self._model = LLM(
                model=str(folder), dtype=str(dtype).removeprefix("torch."), trust_remote_code=trust_remote_code,
                tensor_parallel_size=max(1, torch.cuda.device_count()), generation_config="vllm",
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--backend vllm: {folder}: {error}") from error

    def __call__(self, batch: Sequence[Prompt], receive: Receive) -> None:
        """Answer all prompts; vLLM makes its own batches of them."""
        made = self._model.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in batch],
            [self._parameters(prompt.limit) for prompt in batch],
            use_tqdm=False,
        )
        for prompt, output in zip(batch, made, strict=True):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            ended = answer.finish_reason == "stop"
            receive(prompt, Answer(ids[:-1] if ended and ids and ids[-1] in self._ends else ids, ended))
