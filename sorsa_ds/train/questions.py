"""Held-out prompts that a run's model is asked on its way, as training has laid them out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED, Example

_FEWEST = 2
"""Tokens that a prompt has at least. Of plain text everything but the first token is learned, which asks nothing."""


@dataclass(frozen=True, slots=True)
class Question:
    """The prompt of a held-out example.

    source: a name among the run's sources of data.
    number: the example's place in the source, from 0.
    token_ids: the prompt's token ids.
    expected: the token ids that training would teach behind the prompt, up to what is masked again.
    """

    source: str
    number: int
    token_ids: list[int]
    expected: list[int]


def questions_of(held_out: Mapping[str, Examples], count: int, room: int | None) -> list[Question]:
    """The first `count` prompts of the held-out examples, or as many as there are, taken from their sources in turn.

    Args:
        room: the most tokens that a prompt may have, so that its answer fits behind it; None: any number.
    """
    found: list[Question] = []
    for question in _in_turn(held_out):
        if len(found) == count:
            break
        if len(question.token_ids) >= _FEWEST and (room is None or len(question.token_ids) <= room):
            found.append(question)
    return found


def texts_of(question: Question, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt and what is expected behind it, as texts without special tokens."""
    prompt, expected = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (question.token_ids, question.expected)
    )
    return str(prompt), str(expected)


def _in_turn(held_out: Mapping[str, Examples]) -> Iterator[Question]:
    """A question of each example: the first of every source, then the second of every source, and so on."""
    for number in range(max(map(len, held_out.values()), default=0)):
        for source, examples in held_out.items():
            if number < len(examples):
                yield _question(source, number, examples[number])


def _question(source: str, number: int, example: Example) -> Question:
    ids_T, masked_T = example["input_ids"], example["labels"] == IGNORED
    first = int(np.argmin(masked_T))  # an example learns something
    rest = np.flatnonzero(masked_T[first:])
    end = first + int(rest[0]) if len(rest) else len(ids_T)
    return Question(source, number, ids_T[:first].tolist(), ids_T[first:end].tolist())
