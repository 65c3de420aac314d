"""The examples of a run: rows of its data, in its format, as token ids and labels."""

from collections.abc import Iterable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.chat import end_rendering
from sorsa_ds.data.counts import Counts
from sorsa_ds.data.layout import layout_of, listed
from sorsa_ds.data.source import load_rows
from sorsa_ds.data.tokenize import IGNORED, Encoded, Example, encode_all
from sorsa_ds.runtime.console import say


class Examples(list[Example]):
    """The examples of some rows, and what became of these rows."""

    def __init__(self, examples: Iterable[Example] = (), counts: Counts | None = None) -> None:
        super().__init__(examples)
        self.counts = counts or Counts()


def load_examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out examples as token ids and labels; the held-out list may be empty.

    Says how many rows are cut at `data.max_length`, and how many are left out.

    Args:
        seed: of the generated data.

    Raises:
        ValueError: the data cannot be read, does not fit the format, or holds nothing to learn.
    """
    train_rows, eval_rows = load_rows(data, seed)
    try:
        train = _examples(train_rows, data, data.path, tokenizer, "training")
        if eval_rows is None:
            return train, Examples()
        return train, _examples(eval_rows, data, data.eval_path or data.path, tokenizer, "held-out")
    finally:
        end_rendering()


def _examples(rows: Dataset, data: DataConfig, path: str, tokenizer: PreTrainedTokenizerBase, kind: str) -> Examples:
    """The examples of some rows. What is cut or left out of the rows is counted, and said."""
    most = data.max_length
    what = f"{kind} data ({path})"
    try:
        layout = layout_of(data, rows.column_names)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if layout.ignored:
        say(f"Columns of the {kind} data that are not used: {listed(layout.ignored)}.")
    encoded = encode_all(rows, layout, tokenizer, most, what)
    if encoded.cut:
        say(f"{encoded.cut} of {len(rows)} {kind} examples are cut at {most} tokens (data.max_length).")
    for reason, count in encoded.left_out.items():
        say(f"{count} of {len(rows)} {kind} examples are left out: {reason}.")
    return Examples(encoded.examples, counts_of(len(rows), encoded))


def counts_of(rows: int, encoded: Encoded) -> Counts:
    """What became of some rows.

    Args:
        rows: their number.
        encoded: what they were made into.
    """
    return Counts(
        rows=rows,
        learned_rows=len(encoded.examples),
        left_out=dict(encoded.left_out),
        cut=encoded.cut,
        tokens=sum(len(example["labels"]) for example in encoded.examples),
        learned_tokens=sum(int((example["labels"] != IGNORED).sum()) for example in encoded.examples),
    )
