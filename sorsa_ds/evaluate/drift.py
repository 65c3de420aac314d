"""Putting a measurement of drift together: the base model of what is evaluated, and the texts to measure on."""

import gc
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sorsa_ds.data.tokenize import Example
from sorsa_ds.evaluate import base_samples
from sorsa_ds.evaluate.backends.likelihood import Likelihood
from sorsa_ds.evaluate.base_samples import Sample, Wanted
from sorsa_ds.evaluate.models import FoundModel, base_of
from sorsa_ds.evaluate.options import SAMPLE_TOKENS, SAMPLES, Options
from sorsa_ds.evaluate.tasks.drift import Base, Drift, check_sizes, check_vocabularies, windows_of_samples
from sorsa_ds.evaluate.tasks.loss import windows_of
from sorsa_ds.evaluate.tasks.task import LocalEngine, Setting
from sorsa_ds.model.language_part import text_config
from sorsa_ds.model.skeleton import read_config
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.runtime.waiting import first_of_job


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is loaded, and how.

    dtype: the dtype of the loaded weights; None: the dtype that they have on disk.
    batch_size: the most texts at once.
    """

    device: torch.device
    dtype: torch.dtype | None
    batch_size: int


def drift_from_base(
    options: Options, found: FoundModel, setting: Setting, device: torch.device, dtype: torch.dtype | None
) -> Drift:
    """The task of a model's drift from its base model. A collective call.

    Where the cache has no samples of the base model yet, rank 0 loads that model and draws them, and the others wait.

    Args:
        setting: the setting of the model that is evaluated.
        device: where both models go.
        dtype: the dtype of both models' weights; None: the dtype that they have on disk.

    Raises:
        ValueError: the base model is not known, has another vocabulary, or has no room for the samples; or the text
            cannot be measured.
    """
    name, base = base_of(found, options.model, options.base)
    tokenizer = load_tokenizer(base.tokenizer, base.loading)
    _check_comparable(name, base, tokenizer, found, setting.tokenizer)
    of_base = Setting(tokenizer, base.tokenizer, base.positions())
    weights = first_of_job(base.digest, "hashing the base model's weights")

    def load() -> Likelihood:
        return LocalEngine(base.load(device, dtype), of_base, device, autocast=False).likelihood()

    if options.data is not None:
        windows, how = windows_of(options, setting)
    else:
        windows, how = own_texts(options, base, of_base, weights, Place(device, dtype, options.batch_size))
    return Drift(windows, how, Base(name, weights, load))


def _check_comparable(name: str, base: FoundModel, of_base: Tokenizer, found: FoundModel, of_tuned: Tokenizer) -> None:
    """Stop where it shows without weights that the models' distributions are over different tokens.

    Raises:
        ValueError: a token is another one, or one of the models knows more tokens.
    """
    known, tuned = of_base.get_vocab(), of_tuned.get_vocab()
    check_vocabularies(name, known, tuned)
    size = _vocabulary(base)
    added = [] if found.kind == "model" else [id_ + 1 for token, id_ in tuned.items() if token not in known]
    check_sizes(name, size, _vocabulary(found) if found.kind == "model" else max([size, *added]))


def own_texts(
    options: Options, base: FoundModel, setting: Setting, weights: str, place: Place
) -> tuple[dict[str, Example], str]:
    """The base model's samples as windows, and a sentence on them. A collective call.

    Args:
        setting: the setting of the base model.
        weights: the digest of the base model's weights.

    Raises:
        ValueError: no token is known that begins a text, or the base model has no room for the samples.
    """
    config = _generation(base)
    begin = base_samples.openings(setting.tokenizer, config)
    wanted = _wanted(options, setting.positions, max(map(len, begin)))
    path = base_samples.path_of(weights, base.folder, setting.tokenizer, wanted, place.dtype)

    def samples() -> list[tuple[list[int], int]]:
        kept = base_samples.kept_samples(path, wanted)
        if kept is None:
            model = base.load(place.device, place.dtype)
            kept = base_samples.draw(model, setting.tokenizer, begin, wanted, place.batch_size)
            base_samples.keep_samples(path, kept)
            del model
            gc.collect()  # the model that is evaluated needs the room
            if place.device.type == "cuda":
                torch.cuda.empty_cache()
        return [(one.ids, one.opened) for one in kept]

    made = [Sample(ids, opened) for ids, opened in first_of_job(samples, "sampling the base model")]
    openings = " and from a user's turn in turn" if len(begin) > 1 else ""
    return windows_of_samples(made), (
        f"Texts: {wanted.count} samples of the base model at temperature 1, seed {wanted.seed}, of up to "
        f"{wanted.tokens} tokens, from its first token{openings}."
    )


def _wanted(options: Options, room: int | None, opened: int) -> Wanted:
    """Which samples are asked for.

    Args:
        room: the most tokens that the base model takes; None: any number.
        opened: the tokens with which the samples begin, at most.

    Raises:
        ValueError: the base model has no room for them.
    """
    most = None if room is None else room - opened
    tokens = options.sample_tokens or (SAMPLE_TOKENS if most is None else max(1, min(SAMPLE_TOKENS, most)))
    if most is not None and tokens > most:
        raise ValueError(
            f"--sample_tokens: {tokens} tokens behind an opening of {opened} are more than the {room} that the base "
            f"model takes; at most {max(0, most)} have room"
        )
    return Wanted(options.samples or SAMPLES, tokens, options.seed or 0)


def _generation(base: FoundModel) -> GenerationConfig | None:
    """The base model's own settings of generation; None where it has no such file."""
    try:
        return GenerationConfig.from_pretrained(base.folder)
    except OSError:
        return None


def _vocabulary(found: FoundModel) -> int:
    """The number of tokens in the configuration of a model, or of the base model under an adapter."""
    return text_config(read_config(found.folder, found.loading)).vocab_size
