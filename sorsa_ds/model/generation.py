"""Answers from transformers, one batch at a time, padded on the left; each answer is handed over as it ends.

Answers are greedy, or drawn with a seed of their own. Shapes: B prompts, L positions, C vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from sorsa_ds.data.batches import pad_token_id


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one sample asks.

    id: the sample's id.
    token_ids: the tokens of the prompt, one or more.
    limit: the most tokens of the answer.
    temperature: 0: the most probable token each time; else tokens are drawn from softmax(logits / temperature).
    seed: the seed with which tokens are drawn, from 0 to 2**31 - 1.
    """

    id: str
    token_ids: list[int]
    limit: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated. token_ids: without the end token. ended: by its end token; False: it was cut at the limit."""

    token_ids: list[int]
    ended: bool


Receive = Callable[[Prompt, Answer], None]
"""A function that takes each prompt with its answer, as soon as that is there."""


class Transformers:
    """Generates with a model of transformers on this rank's device.

    Padding is masked and does not count as a position, so that an answer depends on its batch by rounding alone.
    `disturbed_by_padding` tries whether that holds, since recurrent models may ignore the mask.

    Args:
        synced: ranks hold shards of the model and gather them at each forward pass, so that all make as many of them as
            the longest answer of any rank takes; a call is a collective call then.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, synced: bool = False
    ):
        self.model, self._device, self._synced = model, device, synced
        self._pad = pad_token_id(tokenizer, model.config.get_text_config().vocab_size)
        self._ends = torch.tensor(end_tokens(model.generation_config, tokenizer), device=device)
        # The model's own settings may ask for sampling or penalties.
        model.generation_config = GenerationConfig()

    @torch.no_grad()  # and not inference_mode, whose tensors a model that goes on with its training could not save
    def __call__(self, batch: Sequence[Prompt], receive: Receive) -> None:
        """Answer all prompts of a batch."""
        input_ids_BL, mask_BL = self._padded(batch)
        collector = _Collector(batch, input_ids_BL.shape[1], self._ends, receive)
        self._generate(
            inputs=input_ids_BL,
            attention_mask=mask_BL,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max(prompt.limit for prompt in batch), pad_token_id=self._pad
            ),
            logits_processor=LogitsProcessorList([_Drawing(batch, self._device)]),
            stopping_criteria=StoppingCriteriaList([collector]),
            synced_gpus=self._synced,
        )
        collector.rest()

    @torch.inference_mode()
    def disturbed_by_padding(self, prompt: Prompt) -> bool:
        """Whether padding before a prompt changes what the model makes of it, beyond rounding."""
        longer = Prompt("", prompt.token_ids + prompt.token_ids[-1:] * 3, 1)
        alone, beside = (self._first_logits(batch) for batch in ([prompt], [prompt, longer]))
        return (alone - beside).abs().max().item() > 0.05 * alone.std().item()

    def _generate(self, **arguments: Any) -> Any:
        # Only the classes of models that can generate have this method, which PreTrainedModel does not declare.
        return cast(Any, self.model).generate(**arguments)

    def _first_logits(self, batch: Sequence[Prompt]) -> Tensor:
        input_ids_BL, mask_BL = self._padded(batch)
        made = self._generate(
            inputs=input_ids_BL, attention_mask=mask_BL,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=1, pad_token_id=self._pad, output_logits=True,
                return_dict_in_generate=True,
            ),
        )  # fmt: skip
        return made.logits[0][0].float()

    def _padded(self, batch: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        shape = (len(batch), max(len(prompt.token_ids) for prompt in batch))
        input_ids_BL, mask_BL = torch.full(shape, self._pad), torch.zeros(shape, dtype=torch.int64)
        for row, prompt in enumerate(batch):
            input_ids_BL[row, -len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask_BL[row, -len(prompt.token_ids) :] = 1
        return input_ids_BL.to(self._device), mask_BL.to(self._device)


class _Drawing(LogitsProcessor):
    """Makes the largest of the scores a draw, for the prompts that have a temperature above 0.

    Gumbel noise g is added: argmax(logits / T + g) is distributed as softmax(logits / T). Each prompt draws from a
    generator of its own, so that an answer does not depend on the batch that it is made in.
    """

    def __init__(self, batch: Sequence[Prompt], device: torch.device):
        self._rows = [
            (row, prompt.temperature, torch.Generator(device).manual_seed(prompt.seed))
            for row, prompt in enumerate(batch)
            if prompt.temperature
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not self._rows:
            return scores
        scores = scores.float().clone()
        for row, temperature, generator in self._rows:
            gumbel_C = -torch.empty_like(scores[row]).exponential_(generator=generator).log()
            scores[row] = scores[row] / temperature + gumbel_C
        return scores


class _Collector(StoppingCriteria):
    """Ends each row at its end token or its own limit, and hands its answer over at once."""

    def __init__(self, batch: Sequence[Prompt], start: int, end_tokens: Tensor, receive: Receive):
        self._batch, self._start, self._ends, self._receive = batch, start, end_tokens, receive
        self._limits_B = torch.tensor([prompt.limit for prompt in batch])
        self._open_B = torch.ones(len(batch), dtype=torch.bool)
        self._ids_BL: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self._ids_BL = input_ids[:, self._start :]
        ended_B = torch.isin(input_ids[:, -1], self._ends).cpu()
        cut_B = self._ids_BL.shape[1] >= self._limits_B
        for row in torch.nonzero(self._open_B & (ended_B | cut_B)).flatten().tolist():
            self._hand_over(row, bool(ended_B[row]))
        return (~self._open_B).to(input_ids.device)

    def rest(self) -> None:
        """Hand over the answers that are still open when generation ends, whatever has ended it."""
        for row in torch.nonzero(self._open_B).flatten().tolist():
            self._hand_over(row, ended=False)

    def _hand_over(self, row: int, ended: bool) -> None:
        self._open_B[row] = False
        ids = [] if self._ids_BL is None else self._ids_BL[row].tolist()
        self._receive(self._batch[row], Answer(ids[:-1] if ended else ids, ended))


def end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, which training appends, and those that the model's settings name.

    Raises:
        ValueError: neither the tokenizer nor the settings name one.
    """
    named = None if config is None else config.eos_token_id
    named = [] if named is None else named if isinstance(named, list) else [named]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not {*named, *own}:
        raise ValueError("the model names no end token, so no answer of it would ever end")
    return sorted({*named, *own})


def batch_prompts(prompts: Sequence[Prompt], size: int, one_length: bool) -> list[list[Prompt]]:
    """Batches of prompts of similar length, so that little is padded.

    The longest come first: where memory is too small for them, that shows at the start.

    Args:
        size: the most prompts of a batch.
        one_length: each batch holds prompts of one length, for a model whose answers padding changes.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.token_ids), prompt.id))
    made: list[list[Prompt]] = []
    for prompt in ordered:
        full = not made or len(made[-1]) == size
        if full or (one_length and len(made[-1][0].token_ids) != len(prompt.token_ids)):
            made.append([])
        made[-1].append(prompt)
    return made
