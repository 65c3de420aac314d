"""Tokens and labels of the rendered rows.

Whether a token is learned follows from its place in the text, as the tokenizer itself reports it (offsets), and never
from its id. So an end token that is learned, one inside a prompt and one used as padding are told apart.
Shapes: T tokens of one example.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypedDict

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.formats import Rendered, render
from sorsa_ds.data.layout import Layout

IGNORED = -100
ROWS_PER_CALL = 1000


class Example(TypedDict):
    """One tokenised example: input_ids (T,) and labels (T,), int32; a label is the token's own id, or IGNORED."""

    input_ids: np.ndarray
    labels: np.ndarray


class Encoded(NamedTuple):
    """The examples that rows have become.

    left_out: why rows are no example -> how many they are.
    cut: the number of examples that lost their end to `max_length`.
    """

    examples: list[Example]
    left_out: Counter[str]
    cut: int


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Tokens and labels of one text, cut at `max_length` tokens.

    A token is learned if it overlaps a learned span. The first token never is, because nothing predicts it.
    The end token is appended, and learned, if the text asks for one and was not cut.

    Raises:
        ValueError: the tokenizer cannot say where its tokens lie, or has no end token.
    """
    return _cut(next(_encoded([rendered], tokenizer)), max_length)


def encode_all(
    rows: Dataset, layout: Layout, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> Encoded:
    """Tokenise all rows, cut them, and leave out those in which nothing is learned.

    Args:
        what: a name for the rows and the place they come from, for error messages.

    Raises:
        ValueError: a row cannot be rendered, or no example is left.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    cut = 0
    for start in range(0, len(rows), ROWS_PER_CALL):
        part = rows.select(range(start, min(start + ROWS_PER_CALL, len(rows))))
        encoded = encode_rows(part, start, layout, tokenizer, max_length, what)
        examples += encoded.examples
        left_out.update(encoded.left_out)
        cut += encoded.cut
    if not examples:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in left_out.most_common())
        raise ValueError(
            f"{what}: no token to learn in any of {len(rows)} rows ({reasons}): either the prompts alone fill "
            f"data.max_length ({max_length}), then raise it, or the responses are empty or not where "
            f"data.format={layout.format} looks for them"
        )
    return Encoded(examples, left_out, cut)


def encode_rows(
    rows: Iterable[dict], start: int, layout: Layout, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> Encoded:
    """Tokenise some rows, cut them, and leave out those in which nothing is learned, which may be all of them.

    Args:
        start: the number of the first row, from 0.
        what: a name for the rows and the place they come from, for error messages.

    Raises:
        ValueError: a row cannot be rendered.
    """
    examples: list[Example] = []
    rendered = list(_rendered(rows, start, layout, tokenizer, what))
    left_out = Counter(one.left_out for one in rendered if one.left_out)
    cut = 0
    kept = [one for one in rendered if not one.left_out]
    for whole in _encoded(kept, tokenizer) if kept else ():
        example = _cut(whole, max_length)
        if (example["labels"] != IGNORED).any():
            examples.append(example)
            cut += len(whole["labels"]) > max_length
        else:
            left_out[f"the first {max_length} tokens hold nothing to learn"] += 1
    return Encoded(examples, left_out, cut)


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example as text, as the model gets it, with a heading over each masked and each learned part."""
    parts = []
    tokens = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    for learned, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        ids = [token for token, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        parts.append(f"--- {'learned' if learned else 'masked'}, {len(ids)} tokens ---\n{text}\n")
    return "".join(parts)


def _rendered(
    rows: Iterable[dict], start: int, layout: Layout, tokenizer: PreTrainedTokenizerBase, what: str
) -> Iterator[Rendered]:
    for number, row in enumerate(rows, start + 1):
        try:
            yield render(row, layout, tokenizer)
        except ValueError as error:
            raise ValueError(f"{what}, row {number}: {error}") from error


def _cut(example: Example, max_length: int) -> Example:
    return {"input_ids": example["input_ids"][:max_length], "labels": example["labels"][:max_length]}


def _encoded(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens lie in the text (offsets), so the response "
            "cannot be told from the prompt; use the model's fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None and any(rendered.closed for rendered in texts):
        raise ValueError("the tokenizer has no end token (eos_token), so the model could not learn where to stop")
    tokens = tokenizer(
        [rendered.text for rendered in texts],
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    columns = (tokens["input_ids"], tokens["offset_mapping"], tokens["special_tokens_mask"])
    for rendered, ids, offsets, added in zip(texts, *columns, strict=True):
        if rendered.tokens is not None:
            stored_T, labels_T = (np.array(stored, dtype=np.int32) for stored in rendered.tokens)
            labels_T[:1] = IGNORED
            yield {"input_ids": stored_T, "labels": labels_T}
            continue
        yield _labelled(rendered, ids, offsets, added, tokenizer)


def _labelled(
    rendered: Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]],
    added: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    """The tokens that are kept of a text of any length, with their labels.

    Tokens that the tokenizer put before the text are kept, unless the text brings its own BOS. Those that it put behind
    the text are dropped; an end token is appended where the rendered text is `closed`.

    Args:
        added: 1 for each token that the tokenizer put around the text by itself.
    """
    own = len(added) - sum(added)
    first = added.index(0) if own else len(added)
    keep = slice(0 if not _starts_with_bos(rendered.text, tokenizer) else first, first + own)
    ids_T = np.array(ids[keep], dtype=np.int32)
    start_T, end_T = np.array(offsets[keep], dtype=np.int64).reshape(-1, 2).T
    learned_T = np.zeros(len(ids_T), dtype=bool)
    for start, end in rendered.learned:
        learned_T |= (start_T < end) & (end_T > start)
    if rendered.closed:
        ids_T, learned_T = np.append(ids_T, np.int32(tokenizer.eos_token_id)), np.append(learned_T, True)
    learned_T[:1] = False
    labels_T = np.where(learned_T, ids_T, np.int32(IGNORED))
    return {"input_ids": ids_T, "labels": labels_T}


def _starts_with_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
