"""What a model has forgotten, on texts: its own samples before training, English, code, and choices of continuations.

Nothing here needs a benchmark's data: the samples are the base model's, code is Python's standard library, English and
the choices come from a file of instructions with answers.
"""

import ast
import heapq
import inspect
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from sorsa_ds.data.batches import pad_token_id
from sorsa_ds.data.tokenize import IGNORED, Example
from sorsa_ds.evaluate.backends.divergence import divergences
from sorsa_ds.evaluate.backends.likelihood import Likelihood
from sorsa_ds.evaluate.base_samples import Wanted, draw, openings
from sorsa_ds.evaluate.tasks.drift import mean_per_token, windows_of_samples

WINDOW, WINDOWS = 192, 12
"""Tokens of a window of text, and how many windows are scored of each kind of text."""
CHOICES, LONGEST = 4, 48
"""Among how many continuations a choice is made, of how many tokens at most."""
NOT_ENGLISH = 60
"""The first answers of the file are kept for the choices."""
BATCH = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Measures:
    """A base model with the texts on which tuned models are measured against it.

    samples, english, code: windows. choices: for each question its continuations, the right one first.
    losses: the base model's losses on English and code, nats per token.
    right: the base model's share of right choices; None where there are no choices.
    """

    base: Likelihood
    pad: int
    samples: list[Example]
    english: list[Example]
    code: list[Example]
    choices: list[list[Example]]
    losses: dict[str, float]
    right: float | None


def base_measures(
    base: PreTrainedModel, folder: Path, text: Path, samples: tuple[int, int], questions: int
) -> Measures:
    """Sample the base model, read the texts, and measure the base model on them.

    Args:
        text: a JSON file of rows with `instruction`, `input` and `output`.
        samples: how many, and of how many tokens.
        questions: how many choices are made, at most `NOT_ENGLISH`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad = pad_token_id(tokenizer, base.config.get_text_config().vocab_size)
    config = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    drawn = draw(base, tokenizer, openings(tokenizer, config)[:1], Wanted(*samples, seed=0), samples[0])
    rows = [row for row in json.loads(text.read_text(encoding="utf-8")) if len(row["output"]) > 80]
    english = _windows(tokenizer, "\n\n".join(row["output"] for row in rows[NOT_ENGLISH:]))
    code = _windows(tokenizer, "\n".join(inspect.getsource(module) for module in (heapq, textwrap, ast)))
    choices = [_choices(tokenizer, rows, number) for number in range(questions)]
    likelihood = Likelihood(base, _CPU, pad)
    losses = {"english": _loss(likelihood, english), "code": _loss(likelihood, code)}
    own = list(windows_of_samples(drawn).values())
    return Measures(likelihood, pad, own, english, code, choices, losses, _right(likelihood, choices))


def text_measures(model: PreTrainedModel, of_base: Measures) -> dict[str, float | None]:
    """How far a tuned model is from its base model: drift with its standard error, losses, and choices."""
    tuned = Likelihood(model, _CPU, of_base.pad)
    found = [one for some in _batches(of_base.samples) for one in divergences(of_base.base, tuned, some)]
    drift, stderr = mean_per_token([one.kl for one in found], [one.scored for one in found])
    return {
        "drift": drift,
        "drift_stderr": stderr,
        "english": _loss(tuned, of_base.english),
        "english_base": of_base.losses["english"],
        "code": _loss(tuned, of_base.code),
        "code_base": of_base.losses["code"],
        "choices": _right(tuned, of_base.choices),
        "choices_base": of_base.right,
    }


def _windows(tokenizer, text: str) -> list[Example]:
    """The first windows of a text; all but the first token of each is scored."""
    ids = np.array(tokenizer(text[: 12 * WINDOW * WINDOWS], add_special_tokens=False)["input_ids"], dtype=np.int32)
    parts = [ids[start : start + WINDOW] for start in range(0, WINDOW * WINDOWS, WINDOW)]
    return [Example(input_ids=part, labels=part.copy()) for part in parts if len(part) == WINDOW]


def _choices(tokenizer, rows: list[dict], number: int) -> list[Example]:
    """The continuations of an instruction, its own answer first; the others are answers to other instructions."""
    asked = tokenizer(f"{rows[number]['instruction']} {rows[number]['input']}\n")["input_ids"][-WINDOW:]
    found = []
    for choice in range(CHOICES):
        answer = rows[(number + 17 * choice) % len(rows)]["output"]
        own = tokenizer(answer, add_special_tokens=False)["input_ids"][:LONGEST]
        ids = np.array([*asked, *own], dtype=np.int32)
        labels = ids.copy()
        labels[: len(asked)] = IGNORED
        found.append(Example(input_ids=ids, labels=labels))
    return found


def _loss(likelihood: Likelihood, windows: list[Example]) -> float:
    """Nats per token."""
    found = [one for some in _batches(windows) for one in likelihood.losses(some)]
    return sum(nats for nats, _ in found) / sum(count for _, count in found)


def _right(likelihood: Likelihood, choices: list[list[Example]]) -> float | None:
    """The share of instructions whose own answer is the likeliest per token."""
    if not choices:
        return None
    right = 0
    for options in choices:
        per_token = [nats / count for nats, count in likelihood.losses(options)]
        right += per_token[0] == min(per_token)
    return right / len(choices)


def _batches(examples: list[Example]) -> list[list[Example]]:
    return [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
