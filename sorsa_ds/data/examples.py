"""What a run reads: the model's folder, its tokenizer, the examples; and whether they belong together."""

from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.source import load_rows
from sorsa_ds.data.tokenize import Example, encode_all
from sorsa_ds.runtime.console import say


def examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples as token ids and labels; the held-out list may be empty."""
    train_rows, eval_rows = load_rows(data, seed)
    train, dropped = encode_all(train_rows, data.format, tokenizer, data.max_length, "training data")
    if dropped:
        say(f"{dropped} training examples are left out: nothing in their first {data.max_length} tokens is learned.")
    if eval_rows is None:
        return train, []
    return train, encode_all(eval_rows, data.format, tokenizer, data.max_length, "held-out data")[0]
