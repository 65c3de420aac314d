"""The tokenizer that belongs to a model."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.model_files import no_tokenizer


class NoTokenizer(ValueError):
    """A model's folder has no tokenizer, or one that cannot be read."""


def load_tokenizer(folder: Path, loading: LoadingConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        NoTokenizer: the folder has none, or one that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
    except Exception as error:
        raise NoTokenizer(f"model: {folder} has no tokenizer that can be read: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise NoTokenizer(no_tokenizer(folder))
    return tokenizer
