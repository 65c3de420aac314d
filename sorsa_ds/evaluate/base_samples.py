"""Texts that a base model writes by itself, on which it is measured how far a tuned model has moved away from it.

They are sampled once and kept in the cache: whatever is trained from a base model is measured on the same samples. A
sample begins with what begins every text of the model. Of a model with a chat template every other sample begins with
the opening of a user's turn; such a model writes on past the end of a turn. Without a template a sample ends with the
model's end token. Samples are drawn at temperature 1 from the whole vocabulary. The random numbers belong to sample and
position, so that the size of a batch changes nothing but rounding.
Shapes: N samples, B samples of a batch, L positions, C vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList

from sorsa_ds.data.batches import pad_token_id
from sorsa_ds.data.chat import render_prompt
from sorsa_ds.data.token_cache import digest_of_tokenizer
from sorsa_ds.evaluate.prompts import prompt_tokens
from sorsa_ds.model.generation import end_tokens
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.cache import cache_folder
from sorsa_ds.runtime.console import say, tracked
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import finite_json, parse_json

FORMAT = 2
"""Part of the key. Raise it when samples are drawn or stored in another way."""
_QUESTION = "QUESTION"
"""Stands for what a user says, to find what a chat template writes before it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which samples are wanted.

    count: the number of samples.
    tokens: the most tokens of each sample, behind its opening.
    seed: the seed with which all samples are drawn.
    """

    count: int
    tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A text of the base model. opened: how many of its first tokens were given to the model, and are not scored."""

    ids: list[int]
    opened: int


def path_of(
    weights: str, config: Path, tokenizer: PreTrainedTokenizerBase, wanted: Wanted, dtype: torch.dtype | None
) -> Path:
    """The file in the cache for the samples of a base model.

    Args:
        weights: the digest of the base model's weights.
        config: the folder that has the base model's config.json.
        dtype: the dtype in which the base model writes (rounding changes which tokens it chooses); None: the dtype of
            its stored weights.
    """
    decides = {
        "format": FORMAT, "weights": weights, "config": digest.of_file(config / "config.json"),
        "tokenizer": digest_of_tokenizer(tokenizer), "count": wanted.count, "tokens": wanted.tokens,
        "seed": wanted.seed, "dtype": str(dtype),
    }  # fmt: skip
    return cache_folder() / "base_samples" / f"{digest.of_bytes(finite_json(decides).encode())}.json"


def kept_samples(path: Path, wanted: Wanted) -> list[Sample] | None:
    """The samples in a file of the cache; None where there is none, and where it is damaged, which the user is told."""
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
        samples = [Sample(ids, opened) for ids, opened in kept["samples"]]
        if kept["digest"] != _digest(samples):
            raise ValueError("its tokens do not fit its digest")
        if len(samples) != wanted.count:
            raise ValueError(f"it has {len(samples)} samples, and {wanted.count} are wanted")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{path}: damaged ({error}); the base model's samples are made anew")
        return None
    return samples


def keep_samples(path: Path, samples: list[Sample]) -> None:
    """Write samples to the cache. Where it cannot be written, the user is told, and nothing else happens."""
    kept = {"digest": _digest(samples), "samples": [[one.ids, one.opened] for one in samples]}
    try:
        write_json(path, kept)
    except ValueError as error:
        say(f"The base model's samples are not kept: {error}")


def openings(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[list[int]]:
    """The tokens with which samples begin, taken in turn: what begins a text, and a user's turn of a chat template.

    Args:
        config: the model's own settings of generation, which may name the first token.

    Raises:
        ValueError: no token is known that begins a text, or the chat template fails.
    """
    named = None if config is None else config.bos_token_id
    ends = _end_tokens(tokenizer, config)
    first = next((token for token in (tokenizer.bos_token_id, named, *ends) if token is not None), None)
    if first is None:
        raise ValueError("--task drift: the base model names no token that begins a text; measure on a text: --data")
    found = [[first]]
    if tokenizer.chat_template:
        text = render_prompt([{"role": "user", "content": _QUESTION}], tokenizer)
        before, sign, _ = text.partition(_QUESTION)
        if sign and before and (tokens := prompt_tokens(before, tokenizer, bare=True)) not in found:
            found.append(tokens)
    return found


@torch.inference_mode()
def draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begin: list[list[int]], wanted: Wanted, batch_size: int
) -> list[Sample]:
    """Let a model write samples, at temperature 1.

    Args:
        model: on one device, or spread by accelerate.
        begin: the tokens with which samples begin, taken in turn (see `openings`).
        batch_size: the most samples at once.
    """
    ends = [] if tokenizer.chat_template else _end_tokens(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig()  # the model's own may ask for penalties
    numbers = torch.Generator().manual_seed(wanted.seed)
    uniform_NL = torch.rand((wanted.count, wanted.tokens), dtype=torch.float64, generator=numbers)
    pad = pad_token_id(tokenizer, model.config.get_text_config().vocab_size)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=wanted.tokens, pad_token_id=pad, eos_token_id=ends or None
    )
    found: dict[int, Sample] = {}
    batches = list(_batches(wanted.count, len(begin), batch_size))
    for places in tracked(batches, len(batches), "sampling the base model", "batch"):
        opening = begin[places[0] % len(begin)]
        given_BL = torch.tensor([opening] * len(places), device=model.device)
        made_BL = cast(Any, model).generate(  # a method of the classes of models that can generate
            inputs=given_BL,
            attention_mask=torch.ones_like(given_BL),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Chosen(uniform_NL[places], len(opening))]),
        )
        for place, ids in zip(places, made_BL.tolist(), strict=True):
            found[place] = Sample(_up_to_the_end(ids, len(opening), ends), len(opening))
    return [found[place] for place in range(wanted.count)]


class _Chosen(LogitsProcessor):
    """Leaves of all tokens the one that a uniform number chooses, by the inverse of the cumulative distribution.

    Args:
        uniform_BL: a number from 0 to 1 for each sample and each token that is written.
        start: the number of tokens before the first that is written.
    """

    def __init__(self, uniform_BL: Tensor, start: int):
        self._uniform_BL, self._start = uniform_BL, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums_BC = scores.double().softmax(-1).cumsum(-1)
        uniform_B1 = self._uniform_BL[:, input_ids.shape[1] - self._start, None].to(scores.device)
        chosen_B1 = torch.searchsorted(sums_BC, uniform_B1 * sums_BC[:, -1:], right=True)
        chosen_B1 = chosen_B1.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B1, 0.0)


def _batches(count: int, kinds: int, size: int) -> Iterator[list[int]]:
    """The numbers of the samples, in batches whose samples begin alike."""
    for kind in range(min(kinds, count)):
        places = list(range(kind, count, kinds))
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _up_to_the_end(ids: list[int], start: int, ends: list[int]) -> list[int]:
    """The tokens up to the first end token that the model has written, that one included."""
    return ids[: next((place + 1 for place in range(start, len(ids)) if ids[place] in ends), len(ids))]


def _end_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[int]:
    try:
        return end_tokens(config, tokenizer)
    except ValueError:  # the model names none
        return []


def _digest(samples: list[Sample]) -> str:
    return digest.of_bytes(finite_json([[one.ids, one.opened] for one in samples]).encode())
