"""Tokens that a run adds to a model (`data.new_tokens`): their ids, and the rows that its tables get for them.

The tables grow as transformers' `resize_token_embeddings` lets them grow, and only where they have no room: many models
are padded to more rows than their tokenizer has tokens. A new row is the mean of all rows of its table. transformers
adds noise to it, a billionth of the rows' covariance; without it every rank makes the same row by itself.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.model.whole_modules import embeddings_and_head


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> dict[str, int]:
    """Teach a tokenizer tokens that it does not know; returns their ids.

    They are found in a text before anything else is, and stay in decoded text, as special tokens would not.

    Raises:
        ValueError: the tokenizer knows a token already, or does not find it in a text.
    """
    known = tokenizer.get_vocab()
    ids: dict[str, int] = {}
    for token in tokens:
        if token in known:
            raise ValueError(
                f"data.new_tokens: the tokenizer knows {token!r} already (id {known[token]}); leave it out, and train "
                f"the rows of all tokens by adapter.train_whole"
            )
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
        ids[token] = tokenizer.get_vocab()[token]
        if ids[token] not in tokenizer.encode(token, add_special_tokens=False):
            raise ValueError(f"data.new_tokens: {type(tokenizer).__name__} does not find {token!r} in a text")
    return ids


def new_token_ids(folder: Path, loading: LoadingConfig, tokens: Iterable[str]) -> dict[str, int]:
    """The ids that new tokens get from the tokenizer of a model's folder, which is read only if there are any.

    Raises:
        NoTokenizer: the folder has none.
        ValueError: the tokenizer knows a token already, or does not find it in a text (see `add_tokens`).
    """
    tokens = list(tokens)
    return add_tokens(load_tokenizer(folder, loading), tokens) if tokens else {}


def rows_for(ids: Mapping[str, int]) -> int:
    """How many rows a table must have for these tokens; 0 without any."""
    return max(ids.values(), default=-1) + 1


def table_rows(model: nn.Module) -> int:
    """How many rows the input embedding of a model has.

    Raises:
        ValueError: the model does not tell its embeddings.
    """
    return len(embeddings_and_head(model)[0].get_parameter("weight"))


def grow_tables(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings and the head of a model without memory at least so many rows, and its configuration too.

    Raises:
        ValueError: the model's class cannot be resized.
    """
    if not rows:
        return
    try:
        if rows <= table_rows(model):
            return
        model.resize_token_embeddings(rows, mean_resizing=False)  # nothing is drawn on the meta device
        grown = {len(module.get_parameter("weight")) for module in embeddings_and_head(model)}
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"data.new_tokens: {type(model).__name__} has tables that cannot grow: {error}") from error
    if grown != {rows}:
        raise ValueError(f"data.new_tokens: embeddings and head of {type(model).__name__} do not grow alike")


def with_new_rows(table: Tensor, shape: torch.Size) -> Tensor:
    """A table, or a bias, with as many rows as `shape` says: those that it lacks are the mean of the others, in fp32.

    One that has them is returned as it is.
    """
    if table.shape == shape:
        return table
    assert table.shape[1:] == shape[1:] and len(table) < shape[0], (table.shape, shape)
    mean = table.mean(0, dtype=torch.float64).float()
    return torch.cat([table.float(), mean.expand(shape[0] - len(table), *shape[1:])])
