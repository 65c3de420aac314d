"""What decides a model's numbers besides its weights: its configuration, its tokenizer, and its own code.

A run and an adapter keep it (`Numerics`), so that whatever reads them later can name what is another now. The numbers
of the same weights change with `rms_norm_eps` or `rope_theta`, and no digest of a tensor shows that.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.config.yaml_io import flat
from sorsa_ds.model.model_files import CODE
from sorsa_ds.model.skeleton import read_config
from sorsa_ds.model.tokenizer import NoTokenizer, load_tokenizer
from sorsa_ds.runtime import digest

Numerics = dict[str, dict[str, Any]]
"""`config`: fields of the configuration as transformers has resolved them. `tokenizer`: its parts, see
`_tokenizer_parts`. `code`: file -> digest, where code of the model's own was allowed. Empty where nothing was kept."""

_WITHOUT_EFFECT = frozenset((
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "dtype", "eos_token_id", "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
))  # fmt: skip
"""Fields of a configuration that move neither logits nor loss: where it comes from, how it was stored, how weights were
drawn before pre-training, what is returned beside the logits, and where generation ends."""

_PROBE = (
    "Below is an instruction.\n\n### Response: It's 3.14159 + 2_718 = 5.8598…\tdef f(x):\n    return x ** 2  # naïve\n"
    "ÅNGSTRÖM ﬁnd ½ Straße Ελληνικά Русский العربية हिन्दी 日本語の文章 한국어 🙂👩‍👩‍👧 don’t  https://a.b/c?d=e&f\r\n"
)
"""Text of many kinds, whose token ids show normalisation, splitting and merging."""


_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def numerics_of(folder: Path, loading: LoadingConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Numerics:
    """What decides the numbers of the model in a folder.

    Args:
        tokenizer: the folder's, where it is loaded already.

    Raises:
        ValueError: the configuration or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(folder, loading) if tokenizer is None else tokenizer
    return {**_without_tokenizer(folder, loading), "tokenizer": _tokenizer_parts(tokenizer)}


def check_numerics(
    then: Numerics, folder: Path, loading: LoadingConfig, say: Callable[[str], None], now: Numerics | None = None
) -> None:
    """Stop where a model's folder does not give the numbers that it gave when `then` was written down.

    Args:
        say: is told what could not be checked.
        now: what `numerics_of` gives of the folder, where that is known already.

    Raises:
        ValueError: naming each field that differs, with both values; or `then` cannot be understood.
    """
    if not then:
        say(
            f"{folder}: what its configuration and tokenizer were in training was not written down; whether they have "
            f"changed is not checked."
        )
        return
    try:
        now = numerics_of(folder, loading) if now is None else now
    except NoTokenizer as error:
        say(f"The tokenizer of training could not be compared: {error}")
        now = {**_without_tokenizer(folder, loading), "tokenizer": then.get("tokenizer", {})}
    cls = type(read_config(folder, loading))
    try:
        old, new = (flat({**one, "config": _again(cls, one["config"])}) for one in (then, now))
    except Exception as error:  # a configuration's class has its own ways of refusing a value
        raise ValueError(f"what was written down of {folder}'s configuration cannot be read: {error}") from error
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        listing = "; ".join(f"{name} was {_said(old, name)} and is {_said(new, name)} now" for name in changed)
        raise ValueError(
            f"{folder} does not give the numbers that it gave in training: {listing}. Put the files back as they were, "
            f"or name a folder that has them"
        )


def _without_tokenizer(folder: Path, loading: LoadingConfig) -> Numerics:
    found = {"config": _fields(read_config(folder, loading))}
    if loading.trust_remote_code:
        found["code"] = {path.name: digest.of_file(path) for path in sorted(folder.glob(CODE))}
    return found


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as plain JSON, without the fields that have no effect."""
    return _with_effect(json.loads(config.to_json_string(use_diff=False)))


def _again(cls: type[PreTrainedConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as this version of transformers resolves them: another may know more of them, or by other names."""
    # transformers writes an infinite number, as Mamba 2 has one, as an object that only its own reader understands.
    resolved = cls.from_dict(cls._decode_special_floats(dict(fields)))
    return {**_fields(resolved), "model_type": fields.get("model_type")}


def _with_effect(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_effect(inner) for key, inner in value.items() if key not in _WITHOUT_EFFECT}
    return value


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The parts of a tokenizer: its special tokens, and digests of the rest.

    Digests are taken of its vocabulary, of the order in which it merges, of the ids that it makes of a text of many
    kinds, and of its chat template. How a tokenizer is stored does not enter them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in inner.get("merges") or []]
    scores = inner.get("vocab") if isinstance(inner.get("vocab"), list) else []
    return {
        "vocabulary": _digest(sorted(tokenizer.get_vocab().items())),
        "merges": _digest([merges, scores]),
        "cutting": _digest(tokenizer(_PROBE)["input_ids"]),
        "special_tokens": {name: getattr(tokenizer, name) for name in _SPECIAL},
        "chat_template": _digest(tokenizer.chat_template),
    }


def _digest(value: Any) -> str:
    return digest.of_bytes(json.dumps(value, default=str, sort_keys=True).encode())


def _said(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
