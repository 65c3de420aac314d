"""Tokens that are made once and kept: a later run, and every other rank, reads them instead of tokenising rows again.

What is kept goes by a key, the digest of all that tokens depend on: the rows themselves, the settings that say how they
become examples, the tokenizer with its template, and the code of this room and of the libraries that it uses. Where one
of them changes, the tokens are made anew.
"""

import inspect
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.cache import cache_folder
from sorsa_ds.runtime.json_text import finite_json
from sorsa_ds.runtime.versions import package_versions

_LIBRARIES = ("transformers", "tokenizers", "trl", "jinja2")
_OF_ROWS = frozenset((
    "path", "name", "train_split", "eval_path", "eval_split", "eval_size", "mix", "mix_until", "streaming",
    "shuffle_buffer", "packing", "chat_template",
))  # fmt: skip
"""The settings that say which rows there are or what becomes of examples, and not what a row's tokens are. The chat
template counts as a part of the tokenizer."""

_ROWS_AT_ONCE = 10_000


def folder_of(rows: Dataset, data: DataConfig, tokenizer: str) -> Path:
    """Where the tokens of some rows are kept, whether or not they are there.

    Args:
        tokenizer: its digest, `digest_of_tokenizer`.
    """
    settings = {name: value for name, value in asdict(data).items() if name not in _OF_ROWS}
    decides = {
        "rows": _digest_of_rows(rows),
        "settings": settings,
        "tokenizer": tokenizer,
        "code": _digest_of_code(),
        "versions": package_versions(_LIBRARIES),
    }
    return cache_folder() / "tokens" / digest.of_bytes(finite_json(decides).encode())


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of all in a tokenizer that decides tokens: what tokenizer.json has, special tokens, template, code.

    A tokenizer without a tokenizer.json makes no tokens here, and its vocabulary says which it knows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        type(tokenizer).__name__,
        repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str(),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(tokenizer.chat_template),
        *map(digest.of_file, _own_code(tokenizer)),
    )
    return digest.of_bytes("\0".join(parts).encode(errors="surrogatepass"))


def _own_code(tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """The Python files of a tokenizer that is no class of transformers alone: those of its class, and beside them."""
    classes = type(tokenizer).__mro__
    first = next(place for place, cls in enumerate(classes) if cls.__module__.startswith("transformers."))
    folders = dict.fromkeys(Path(inspect.getfile(cls)).parent for cls in classes[:first])
    return [file for folder in folders for file in sorted(folder.glob("*.py"))]


class _Hashing(io.RawIOBase):
    """A file that keeps nothing but the digest of what is written to it."""

    def __init__(self) -> None:
        self.state = xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.state.update(data)
        return memoryview(data).nbytes


def _digest_of_rows(rows: Dataset) -> str:
    """The digest of what rows hold, wherever it lies. It takes a second per gigabyte."""
    found = _Hashing()
    arrow = rows.with_format("arrow")
    with pyarrow.PythonFile(found, mode="w") as sink, pyarrow.ipc.new_stream(sink, arrow[:0].schema) as writer:
        for table in arrow.iter(_ROWS_AT_ONCE):
            writer.write_table(table.combine_chunks())
    return found.state.hexdigest()


def _digest_of_code(room: Path = Path(__file__).parent) -> str:
    """The digest of this room's modules, so that a change of how rows become tokens is never overlooked."""
    files = sorted(room.glob("*.py"))
    return digest.of_bytes(b"\0".join(part for file in files for part in (file.name.encode(), file.read_bytes())))
