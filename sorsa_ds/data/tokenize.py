"""Tokens and labels of the rendered rows.

Whether a token is learned follows from its place in the text, as the tokenizer itself reports it (offsets), and never
from its id. So an end token that is learned, one inside a prompt and one used as padding are told apart.
Shapes: T tokens of one example.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypedDict

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig, Truncation
from sorsa_ds.data.chat import special_tokens
from sorsa_ds.data.counts import Counts
from sorsa_ds.data.formats import IGNORED, Rendered, render
from sorsa_ds.data.layout import Layout, layout_of

ROWS_PER_CALL = 1000

NOTHING = "they hold nothing to learn"
NOTHING_LEFT = "what data.max_length leaves of them holds nothing to learn"
TOO_LONG = "they are longer than data.max_length"
"""Why rows are no examples, beside the reasons that `Rendered.left_out` gives."""


class Example(TypedDict):
    """One tokenised example: input_ids (T,) and labels (T,), int32; a label is the token's own id, or IGNORED."""

    input_ids: np.ndarray
    labels: np.ndarray


class RowError(ValueError):
    """A row cannot be learned from, and the run stops.

    Args:
        what: a name for the rows and the place they come from.
        number: the row's number, from 1.
        told: why.
    """

    def __init__(self, what: str, number: int, told: str):
        super().__init__(what, number, told)
        self._what, self.number, self._told = what, number, told

    def __str__(self) -> str:
        return f"{self._what}, row {self.number}: {self._told}"

    def at(self, place: str) -> ValueError:
        """The same error, with the row's place in its file where that is known."""
        return ValueError(f"{self._what}, row {self.number}{f' ({place})' if place else ''}: {self._told}")


class Encoded(NamedTuple):
    """The examples that rows have become.

    left_out: why rows are no example -> how many they are.
    cut: the number of examples that lost a part to `max_length`.
    remarks: what of rows is learned otherwise than one might think -> how many they are.
    """

    examples: list[Example]
    left_out: Counter[str]
    cut: int
    remarks: Counter[str]

    @property
    def counts(self) -> Counts:
        """What became of the rows."""
        return Counts(
            rows=len(self.examples) + self.left_out.total(),
            learned_rows=len(self.examples),
            left_out=dict(self.left_out),
            cut=self.cut,
            remarks=dict(self.remarks),
            tokens=sum(len(example["labels"]) for example in self.examples),
            learned_tokens=sum(int((example["labels"] != IGNORED).sum()) for example in self.examples),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """How rows become examples.

    max_length: the most tokens of an example.
    truncation: what becomes of longer ones, `data.truncation`.
    what: a name for the rows and the place they come from, for error messages.
    special: matches the tokenizer's special tokens; made here, once for all rows.
    """

    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: Truncation = "right"
    what: str
    special: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special", special_tokens(self.tokenizer))

    @classmethod
    def of(cls, data: DataConfig, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, what: str) -> "Encoder":
        """The encoder that a run's settings ask for.

        Raises:
            ValueError: the rows' columns are not those of the format.
        """
        try:
            layout = layout_of(data, columns)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        return cls(
            layout=layout, tokenizer=tokenizer, max_length=data.max_length, truncation=data.truncation, what=what
        )


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Tokens and labels of one text, cut at `max_length` tokens.

    A token is learned if it overlaps a learned span. The first token never is, because nothing predicts it.
    The end token is appended, and learned, if the text asks for one and was not cut.

    Raises:
        ValueError: the tokenizer cannot say where its tokens lie, or has no end token.
    """
    return cut_right(next(_encoded([rendered], tokenizer)), max_length)


def encode_all(
    rows: Dataset, layout: Layout, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> Encoded:
    """Tokenise all rows, cut them on the right, and keep the examples in memory.

    Args:
        what: a name for the rows and the place they come from, for error messages.

    Raises:
        ValueError: a row cannot be rendered, or no example is left.
    """
    encoder = Encoder(layout=layout, tokenizer=tokenizer, max_length=max_length, what=what)
    whole = Encoded([], Counter(), 0, Counter())
    for start in range(0, len(rows), ROWS_PER_CALL):
        part = encode_rows(rows.select(range(start, min(start + ROWS_PER_CALL, len(rows)))), start, encoder)
        whole.examples.extend(part.examples)
        left_out, remarks = whole.left_out + part.left_out, whole.remarks + part.remarks
        whole = whole._replace(left_out=left_out, cut=whole.cut + part.cut, remarks=remarks)
    check_any(whole.counts, encoder)
    return whole


def check_any(counts: Counts, encoder: Encoder) -> None:
    """Stop where no row at all has become an example.

    Raises:
        ValueError: the message says what became of the rows.
    """
    if not counts.learned_rows:
        raise ValueError(
            f"{encoder.what}: no token to learn in any of {counts.rows} rows{counts.reasons()}: either the prompts "
            f"alone fill data.max_length ({encoder.max_length}), then raise it, or the responses are empty or not "
            f"where data.format={encoder.layout.format} looks for them"
        )


def encode_rows(rows: Iterable[Mapping[str, Any]], start: int, encoder: Encoder) -> Encoded:
    """Tokenise some rows and cut them. Rows that are no example are left out and counted, which may be all of them.

    Args:
        start: the number of the first row, from 0.

    Raises:
        ValueError: a row cannot be rendered, or is longer than allowed.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    cut = 0
    rendered = list(_rendered(rows, start, encoder))
    kept = [(number, one) for number, one in enumerate(rendered, start + 1) if not one.left_out]
    left_out.update(one.left_out for one in rendered if one.left_out)
    remarks = Counter(remark for _, one in kept for remark in one.remarks)
    for (number, _), whole in zip(kept, _encoded([one for _, one in kept], encoder.tokenizer), strict=True):
        example = _shortened(whole, encoder, number)
        if isinstance(example, str):
            left_out[example] += 1
        else:
            examples.append(example)
            cut += len(example["labels"]) < len(whole["labels"])
    return Encoded(examples, left_out, cut, remarks)


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example as text, as the model gets it, with a heading over each masked and each learned part."""
    parts = []
    tokens = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    for learned, run in groupby(tokens, key=lambda token: token[1] != IGNORED):
        ids = [token for token, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        parts.append(f"--- {'learned' if learned else 'masked'}, {len(ids)} tokens ---\n{text}\n")
    return "".join(parts)


def _rendered(rows: Iterable[Mapping[str, Any]], start: int, encoder: Encoder) -> Iterator[Rendered]:
    for number, row in enumerate(rows, start + 1):
        try:
            yield render(row, encoder.layout, encoder.tokenizer, encoder.special)
        except ValueError as error:
            raise RowError(encoder.what, number, str(error)) from error


def _shortened(whole: Example, encoder: Encoder, number: int) -> Example | str:
    """An example of at most `max_length` tokens; or why the row is no example."""
    if not _learns(whole):
        return NOTHING
    length, most = len(whole["labels"]), encoder.max_length
    if length <= most:
        return whole
    if encoder.truncation == "error":
        raise RowError(
            encoder.what,
            number,
            f"it has {length} tokens, more than data.max_length ({most}): raise that, or say with data.truncation what "
            f"is to become of long rows (right, left, drop)",
        )
    if encoder.truncation == "drop":
        return TOO_LONG
    shorter = cut_left(whole, most, encoder.tokenizer) if encoder.truncation == "left" else cut_right(whole, most)
    return shorter if _learns(shorter) else NOTHING_LEFT


def cut_right(example: Example, max_length: int) -> Example:
    """The first tokens of an example."""
    return {"input_ids": example["input_ids"][:max_length], "labels": example["labels"][:max_length]}


def cut_left(example: Example, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The last tokens of an example. A BOS at its beginning stays, and the first token is never learned.

    Some tokenizers call the marker of a turn their BOS; it comes more than once, and goes with its turn.
    """
    begins = example["input_ids"][:1]
    is_bos = example["input_ids"] == (-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    kept = int(is_bos[0] and is_bos.sum() == 1)
    ends = slice(len(example["labels"]) - max_length + kept, None)
    ids = np.concatenate([begins[:kept], example["input_ids"][ends]])
    labels = np.concatenate([example["labels"][:kept], example["labels"][ends]])
    labels[:1] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _learns(example: Example) -> bool:
    return bool((example["labels"] != IGNORED).any())


def _encoded(rows: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """An example of each row, of any length. Rows that are stored as tokens need nothing of the tokenizer."""
    texts = [row for row in rows if row.tokens is None]
    made = _tokenised(texts, tokenizer) if texts else iter(())  # tokenizers do not take an empty list
    for row in rows:
        yield next(made) if row.tokens is None else _stored(*row.tokens)


def _stored(ids: list[int], labels: list[int]) -> Example:
    ids_T, labels_T = np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)
    labels_T[:1] = IGNORED
    return {"input_ids": ids_T, "labels": labels_T}


def _tokenised(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
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
        yield _labelled(rendered, ids, offsets, added, tokenizer)


def _labelled(
    rendered: Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]],
    added: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    """The tokens that are kept of a text of any length, with their labels.

    Tokens that the tokenizer put before the text are kept, unless the text is bare or brings its own BOS. Those that it
    put behind the text are dropped; an end token is appended where the rendered text is `closed`.

    Args:
        added: 1 for each token that the tokenizer put around the text by itself.
    """
    own = len(added) - sum(added)
    first = added.index(0) if own else len(added)
    is_bare = rendered.bare or _starts_with_bos(rendered.text, tokenizer)
    keep = slice(first if is_bare else 0, first + own)
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
