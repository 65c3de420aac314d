"""What a run reads before it loads any weight: tokenizer and examples, checked against the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.batches import BatchPlan, pad_token_id
from sorsa_ds.data.examples import Examples
from sorsa_ds.data.run_data import load_data, load_held_out, open_stream, passes_of
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.data.tokenize import Example, show_example
from sorsa_ds.model.numerics import Numerics, numerics_of
from sorsa_ds.model.skeleton import read_config, skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.run.snapshots import stored_linears
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.train.origin import Origin
from sorsa_ds.train.settings import RunSettings
from sorsa_ds.train.start_check import check_fits, check_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads.

    numerics: what decides the model's numbers besides its weights.
    batches: the micro-batches of every step, for this rank.
    data_digest: digest of the training examples, the same on every rank; of a stream, of those that it begins with.
    data_size: how many examples there are, in words.
    held_out: held-out examples of each source that has any.
    sources: tells for each source what became of its rows, and how many of its examples the run has taken.
    stored: the linears to snapshot; empty if `analysis.every` is 0.
    """

    numerics: Numerics
    batches: BatchPlan | StreamBatches
    data_digest: str
    data_size: str
    held_out: dict[str, Examples]
    sources: Callable[[], dict[str, dict[str, Any]]]
    stored: list[Target]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """The training data of a run; see `Inputs`. some: examples that are there already, to be looked at."""

    batches: BatchPlan | StreamBatches
    size: str
    some: Sequence[Example]
    held_out: dict[str, Examples]
    sources: Callable[[], dict[str, dict[str, Any]]]


def read_inputs(settings: RunSettings, origin: Origin) -> Inputs:
    """Read the tokenizer and the examples, and check that they fit the model. A collective call.

    Raises:
        ValueError: a tokenizer or data that cannot be read, or that do not belong to the model.
    """
    config, model_folder = settings.config, settings.model_folder
    tokenizer = load_tokenizer(model_folder, config.loading)
    numerics = numerics_of(model_folder, config.loading, tokenizer)
    origin.check_numerics(numerics, model_folder, config.loading)
    data = _streamed(settings, origin, tokenizer) if config.data.streaming else _stored(settings, tokenizer)
    data_digest = data.batches.digest
    origin.check_data(data_digest)
    check_fits(model_folder, config.loading, [*data.some, *chain.from_iterable(data.held_out.values())])
    stored = _stored_linears(settings, origin)
    say(show_example(data.some[0], tokenizer))
    return Inputs(
        numerics=numerics,
        batches=data.batches,
        data_digest=data_digest,
        data_size=data.size,
        held_out=data.held_out,
        sources=data.sources,
        stored=stored,
    )


def _stored(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> _Data:
    """The data of a run that reads all of it before training begins."""
    config = settings.config
    data = load_data(config.data, tokenizer, config.train.seed)
    examples, passes = data.examples, passes_of(config.data, data.train, config.train.seed)
    batches = BatchPlan(
        examples,
        **_shape(settings, tokenizer),
        seed=config.train.seed,
        steps=config.train.steps,
        epochs=config.train.epochs,
        passes=passes,
    )
    ends = list(accumulate(map(len, data.train.values())))

    def sources() -> dict[str, dict[str, Any]]:
        taken = passes.taken(batches.order.positions, ends)
        return {
            name: {**one.counts.as_dict(), "taken": count}
            for (name, one), count in zip(data.train.items(), taken, strict=True)
        }

    size = f"{len(examples):,} examples"
    return _Data(batches=batches, size=size, some=examples, held_out=data.held_out, sources=sources)


def _streamed(settings: RunSettings, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> _Data:
    """The data of a run that reads it while it trains. A collective call.

    Raises:
        ValueError: the data cannot be read, or examples may become longer than the model takes; on every rank.
    """
    config, folder = settings.config, settings.model_folder
    check_length(folder, config.loading, config.data.max_length)

    def check(examples: Sequence[Example]) -> None:
        check_fits(folder, config.loading, examples)

    seed = config.train.seed
    held_out, stream = collectives.together(
        lambda: (
            load_held_out(config.data, tokenizer, seed),
            open_stream(config.data, tokenizer, seed, origin.stream, check),
        ),
        settings.device,
    )
    assert config.train.steps is not None, "the settings ask for it"
    batches = StreamBatches(stream, **_shape(settings, tokenizer), steps=config.train.steps, device=settings.device)

    def sources() -> dict[str, dict[str, Any]]:
        return {name: {**one.as_dict(), "taken": batches.taken[name]} for name, one in batches.counts.items()}

    size = "a stream of examples"
    return _Data(batches=batches, size=size, some=batches.first, held_out=held_out, sources=sources)


def _shape(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """How the examples of a step are dealt out, and with what they are padded."""
    vocabulary = read_config(settings.model_folder, settings.config.loading).vocab_size
    return {
        "micro_batch_size": settings.resolved.micro_batch_size,
        "accumulation": settings.resolved.gradient_accumulation_steps,
        "rank": collectives.rank(),
        "world_size": collectives.world_size(),
        "pad_token_id": pad_token_id(tokenizer, vocabulary),
    }


def _stored_linears(settings: RunSettings, origin: Origin) -> list[Target]:
    """The linears of which snapshots will be taken, checked against the snapshots that are there."""
    config = settings.config
    if not config.analysis.every:
        return []
    model = skeleton(settings.model_folder, config.loading)
    stored = stored_linears(model, config)
    origin.check_snapshots(model, config, settings.device)
    return stored
