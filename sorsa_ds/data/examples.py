"""What a run reads: the model's folder, its tokenizer, the examples; and whether they belong together."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from sorsa_ds.config.schema import EMBEDDED_MODEL, DataConfig, LoadingConfig
from sorsa_ds.data.source import load_rows
from sorsa_ds.data.tokenize import Example, encode_all
from sorsa_ds.model import pretrained
from sorsa_ds.model.architectures import make_known
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.runtime.console import say


def find_model(model: str, loading: LoadingConfig) -> Path:
    """The folder of the configured model; the embedded one is converted first if it never was.

    Raises:
        ValueError: there is no such model, or its architecture needs a package that is not installed.
    """
    if model == EMBEDDED_MODEL:
        return ensure_embedded_model(say)
    folder = pretrained.find(model, loading.revision)
    make_known(folder)
    return folder


def load_tokenizer(folder: Path, loading: LoadingConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: the folder has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
    except Exception as error:
        raise ValueError(f"model: {folder} has no tokenizer that can be read: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"model: {folder} has no tokenizer (tokenizer.json); copy its model's there")
    return tokenizer


def examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples as token ids and labels; the held-out list may be empty."""
    train_rows, eval_rows = load_rows(data, seed)
    train, dropped = encode_all(train_rows, data.format, tokenizer, data.max_length, "training data")
    if dropped:
        say(f"{dropped} training examples are left out: nothing in their first {data.max_length} tokens is learned.")
    if eval_rows is None:
        return train, []
    return train, encode_all(eval_rows, data.format, tokenizer, data.max_length, "held-out data")[0]


def check_fits(folder: Path, loading: LoadingConfig, some: list[Example]) -> None:
    """Stop before the model is loaded if an example is too long for it, or holds a token that it does not know.

    Raises:
        ValueError: naming the number and the limit.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(len(example["input_ids"]) for example in some)
    if positions is not None and longest > positions:
        raise ValueError(f"data.max_length: an example has {longest} tokens, the model takes {positions}; lower it")
    largest = max(int(example["input_ids"].max()) for example in some)
    if largest >= config.vocab_size:
        raise ValueError(
            f"model: its tokenizer makes token {largest}, but it knows only {config.vocab_size}: they do not belong "
            f"together"
        )
