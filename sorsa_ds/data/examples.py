"""The examples of a run: rows of its data, in its format, as token ids and labels."""

from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.source import load_rows
from sorsa_ds.data.tokenize import Example, encode_all
from sorsa_ds.runtime.console import say


def load_examples(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples as token ids and labels; the held-out list may be empty.

    Args:
        seed: of the generated data.

    Raises:
        ValueError: the data cannot be read, does not fit the format, or holds nothing to learn.
    """
    train_rows, eval_rows = load_rows(data, seed)
    train, dropped = encode_all(train_rows, data.format, tokenizer, data.max_length, "training data")
    if dropped:
        say(f"{dropped} training examples are left out: their first {data.max_length} tokens hold nothing to learn.")
    if eval_rows is None:
        return train, []
    return train, encode_all(eval_rows, data.format, tokenizer, data.max_length, "held-out data")[0]
