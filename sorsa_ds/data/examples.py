"""The examples of a run: rows of its data, in its format, as token ids and labels."""

import os
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.chat import describe_template, end_rendering
from sorsa_ds.data.chat_templates import use_template
from sorsa_ds.data.layout import TURNS, Layout, listed
from sorsa_ds.data.source import load_rows, place_of_row
from sorsa_ds.data.token_cache import digest_of_tokenizer, folder_of
from sorsa_ds.data.token_store import Examples, check_stored, opened, store
from sorsa_ds.data.tokenize import Encoder, check_any
from sorsa_ds.data.workers import encode_in_parts
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.made_once import made_once
from sorsa_ds.runtime.waiting import first_of_node

TRAINING, HELD_OUT = "training", "held-out"


def load_examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out examples; of the latter there may be none. A collective call.

    One rank of each node reads the rows and tokenises them, where that was never done before; the others wait. Says how
    many rows are cut at `data.max_length`, and how many are left out.

    Args:
        tokenizer: is given the chat template that `data.chat_template` asks for.
        seed: the seed with which the embedded data are generated.

    Raises:
        ValueError: the data cannot be read, does not fit the format, holds nothing to learn, or is not the same on all
            nodes; or the cache cannot be written.
    """
    found = _load(data, tokenizer, seed, [TRAINING, HELD_OUT])
    return found[TRAINING], found.get(HELD_OUT) or Examples.of([])


def load_held_out(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """The held-out examples alone; see `load_examples`."""
    return _load(data, tokenizer, seed, [HELD_OUT]).get(HELD_OUT) or Examples.of([])


def _load(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, kinds: list[str]) -> dict[str, Examples]:
    """The examples of each kind of which there are any."""
    asked = data.chat_template

    def made() -> dict[str, Examples]:
        folders = first_of_node(lambda: _tokenised(data, tokenizer, seed, kinds), "tokenising the data")
        return {kind: opened(Path(folder), _source(data, kind)) for kind, folder in folders.items()}

    # A rank that failed alone would leave those of other nodes in the collective of `check_same`.
    if asked is not None:
        collectives.together(lambda: use_template(tokenizer, asked))
    found = collectives.together(made)
    for kind, examples in found.items():
        check_same(examples.digest, f"the {kind} data ({examples.counts.source})")
    for kind, examples in found.items():
        for told in examples.counts.notes(kind, data.max_length):
            say(told)
    return found


def check_same(digest: str, what: str) -> None:
    """Stop all ranks where one has read other data than another. A collective call.

    Args:
        digest: the digest of the examples that this rank has.
        what: names them in the message, as in `the training data`.

    Raises:
        ValueError: the digests of some ranks differ; the message names the nodes.
    """
    node = os.uname().nodename
    for other, theirs in collectives.gather_json((node, digest)):
        if theirs != digest:
            raise ValueError(
                f"{what} is not the same on all nodes: {other} makes other tokens of it than {node}; copy the files "
                "anew, and see to it that all nodes have the same packages"
            )


def _tokenised(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, kinds: list[str]) -> dict[str, str]:
    """See to it that the tokens are in the cache; returns the folder of each kind of which there are any."""
    rows = dict(zip((TRAINING, HELD_OUT), load_rows(data, seed), strict=True))
    own = digest_of_tokenizer(tokenizer)  # before it is used, which can change its state
    try:
        return {
            kind: str(_kept(found, data, tokenizer, own, kind)) for kind in kinds if (found := rows[kind]) is not None
        }
    finally:
        end_rendering()


def _kept(rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase, own: str, kind: str) -> Path:
    """The folder in which the tokens of some rows are kept, after they were made if they never were."""
    encoder = Encoder.of(data, rows.column_names, tokenizer, f"{kind} data ({_source(data, kind)})")
    if encoder.layout.ignored:
        say(f"Columns of the {kind} data that are not used: {listed(encoder.layout.ignored)}.")
    template = _template(encoder.layout, tokenizer)
    if encoder.layout.format in TURNS and kind == TRAINING:
        say(template)
    folder = folder_of(rows, data, own)

    def fill(empty: Path) -> None:
        parts = encode_in_parts(rows, data, encoder, lambda number: place_of_row(data, number, kind == HELD_OUT))
        check_any(store(empty, parts, template), encoder)

    try:
        if not made_once(folder, fill, f"tokenises the {kind} data", say):
            check_stored(folder)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror or error}); the environment variable SORSA_CACHE names "
            "another folder for the cache"
        ) from error
    return folder


def _template(layout: Layout, tokenizer: PreTrainedTokenizerBase) -> str:
    """How rows become texts, in words."""
    if layout.format in TURNS:
        return f"The assistant's turns are told apart {describe_template(tokenizer)}."
    if layout.format == "completion" and layout.prompt is None and tokenizer.chat_template:
        return (
            f"completion; where rows hold messages, the assistant's turns are told apart {describe_template(tokenizer)}"
        )
    return layout.kind


def _source(data: DataConfig, kind: str) -> str:
    return data.path if kind == TRAINING else data.eval_path or data.path
