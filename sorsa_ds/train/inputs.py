"""What a run reads before it loads any weight: tokenizer and examples, checked against the model."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from sorsa_ds.config import batch_size
from sorsa_ds.config.batch_size import data_ranks
from sorsa_ds.config.schema import DataConfig, RunConfig
from sorsa_ds.data.batches import BatchPlan, pad_token_id
from sorsa_ds.data.counts import Taken
from sorsa_ds.data.examples import check_same
from sorsa_ds.data.packing import Packing
from sorsa_ds.data.run_data import load_data, load_held_out, open_stream, passes_of
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import show_example
from sorsa_ds.model import sequence_parallel
from sorsa_ds.model.data_fit import check_fits, check_length
from sorsa_ds.model.language_part import most_positions, text_config
from sorsa_ds.model.new_tokens import add_tokens, rows_for
from sorsa_ds.model.numerics import Numerics, numerics_of
from sorsa_ds.model.packed_attention import check_packing, joins_rows
from sorsa_ds.model.skeleton import read_config, skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.run.snapshots import stored_linears
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.train.origin import Origin
from sorsa_ds.train.questions import Question, questions_of
from sorsa_ds.train.settings import RunSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads.

    numerics: what decides the model's numbers besides its weights.
    batches: the micro-batches of every step, for this rank.
    data_digest: digest of the training examples, the same on every rank; of a stream, of those that it begins with.
    data_size: how many examples there are, in words.
    held_out: held-out examples of each source that has any.
    sources: tells for each source what became of its rows, and how many of its examples so many steps take.
    stored: the linears to snapshot; empty if `analysis.every` is 0.
    questions: held-out prompts that the model is asked on the way and at the end.
    room: the most tokens that the model takes; None: any number.
    tokenizer: the model's, with the new tokens.
    chat_template: the one that the settings ask for; None where it is the tokenizer's own.
    """

    numerics: Numerics
    batches: BatchPlan | StreamBatches
    data_digest: str
    data_size: str
    held_out: dict[str, Examples]
    sources: Callable[[int], dict[str, Taken]]
    stored: list[Target]
    questions: list[Question]
    room: int | None
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """The training data of a run; see `Inputs`. some: examples that are there already, to be looked at."""

    batches: BatchPlan | StreamBatches
    size: str
    some: Examples
    held_out: dict[str, Examples]
    sources: Callable[[int], dict[str, Taken]]


def read_inputs(settings: RunSettings, origin: Origin) -> Inputs:
    """Read the tokenizer and the examples, and check that they fit the model. A collective call.

    Raises:
        ValueError: a tokenizer or data that cannot be read, or that do not belong to the model; a model whose examples
            cannot be packed or cut.
    """
    config, model_folder = settings.config, settings.model_folder
    if (size := config.train.sequence_parallel) > 1:
        sequence_parallel.check_model(skeleton(model_folder, config.loading), size, config.data.max_length)
    tokenizer = load_tokenizer(model_folder, config.loading)
    numerics = numerics_of(model_folder, config.loading, tokenizer)  # of the model's own, before it learns new tokens
    add_tokens(tokenizer, config.data.new_tokens)
    origin.check_numerics(numerics, model_folder, config.loading)
    data = origin.data_settings(config.data)
    packing = _packing(settings)
    read = (
        _streamed(settings, data, origin, tokenizer) if data.streaming else _stored(settings, data, tokenizer, packing)
    )
    data_digest = read.batches.digest
    origin.check_data(data_digest)
    origin.check_length(config, read.batches.steps, settings.device)
    rows = rows_for(settings.new_tokens)
    check_fits(model_folder, config.loading, [read.some, *read.held_out.values()], rows)
    room = most_positions(read_config(model_folder, config.loading))
    stored = _stored_linears(settings, origin)
    say(show_example(read.some[0], tokenizer))
    return Inputs(
        numerics=numerics,
        batches=read.batches,
        data_digest=data_digest,
        data_size=read.size,
        held_out=read.held_out,
        sources=read.sources,
        stored=stored,
        questions=_questions(config, read.held_out, room),
        room=room,
        tokenizer=tokenizer,
        chat_template=None if data.chat_template is None else tokenizer.get_chat_template(),
    )


def _questions(config: RunConfig, held_out: dict[str, Examples], room: int | None) -> list[Question]:
    """The held-out prompts that the model is asked.

    Raises:
        ValueError: answers on the way are asked for, and there is no prompt for them.
    """
    watched = config.evaluation
    before = None if room is None else room - watched.sample_tokens
    found = questions_of(held_out, max(watched.samples, int(watched.last_answer)), before)
    if watched.samples and not found:
        raise ValueError(
            f"evaluation.samples={watched.samples}: no held-out example has a prompt that leaves room for an answer of "
            f"evaluation.sample_tokens={watched.sample_tokens}; set it to 0, or hold out rows with prompts"
        )
    return found


def _packing(settings: RunSettings) -> Packing | None:
    """How rows are packed; None where they are not.

    Raises:
        ValueError: the model cannot keep the examples of a row apart.
    """
    config = settings.config
    if not config.data.packing:
        return None
    check_packing(skeleton(settings.model_folder, config.loading))
    return Packing.of(settings.resolved.micro_batch_size, config.data.max_length, joins_rows(config.loading))


def _stored(
    settings: RunSettings, asked: DataConfig, tokenizer: PreTrainedTokenizerBase, packing: Packing | None
) -> _Data:
    """The data of a run that reads all of it before training begins. A collective call."""
    train = settings.config.train
    data = load_data(asked, tokenizer, train.seed)
    passes = passes_of(asked, data.train, train.seed)
    batches = BatchPlan(
        data.examples,
        **_shape(settings, tokenizer),
        seed=train.seed,
        steps=train.steps,
        epochs=train.epochs,
        packing=packing,
        passes=passes,
    )
    ends = list(accumulate(map(len, data.train.values())))

    def sources(steps: int) -> dict[str, Taken]:
        taken = passes.taken(min(steps * batches.order.global_batch, batches.order.positions), ends)
        return {name: Taken(one.counts, count) for (name, one), count in zip(data.train.items(), taken, strict=True)}

    return _Data(
        batches=batches,
        size=f"{len(data.examples):,} examples, {_told_epochs(batches.order.positions / len(passes))}",
        some=data.examples,
        held_out=data.held_out,
        sources=sources,
    )


def _told_epochs(epochs: float) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"


def _streamed(settings: RunSettings, asked: DataConfig, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> _Data:
    """The data of a run that reads it while it trains. A collective call.

    Raises:
        ValueError: the data cannot be read or is not the same on all nodes, or examples may become longer than the
            model takes; on every rank.
    """
    train, loading, folder = settings.config.train, settings.config.loading, settings.model_folder
    check_length(folder, loading, asked.max_length)
    assert train.steps is not None, "the settings ask for it"

    def check(examples: Examples) -> None:
        check_fits(folder, loading, [examples], rows_for(settings.new_tokens))

    held_out, stream = collectives.together(
        lambda: (
            load_held_out(asked, tokenizer, train.seed),
            open_stream(asked, tokenizer, train.seed, origin.stream, check),
        ),
        settings.device,
    )
    check_same(stream.digest, "the streamed data")
    check_same("".join(f"{name}: {one.digest}\n" for name, one in held_out.items()), "the held-out data")
    batches = StreamBatches(stream, **_shape(settings, tokenizer), steps=train.steps, device=settings.device)
    some = Examples.of(batches.first)
    return _Data(
        batches=batches, size="a stream of examples", some=some, held_out=held_out, sources=lambda _: batches.taken
    )


def _shape(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How the examples of a step are dealt out, and with what they are padded."""
    own = text_config(read_config(settings.model_folder, settings.config.loading)).vocab_size
    vocabulary = max(own, rows_for(settings.new_tokens))
    train, data, micro = settings.config.train, settings.config.data, settings.resolved.micro_batch_size
    return {
        "micro_batch_size": micro,
        "micro_batch_tokens": batch_size.most_positions(train.micro_batch_tokens, micro, data.max_length),
        "accumulation": settings.resolved.gradient_accumulation_steps,
        "rank": collectives.rank() // train.sequence_parallel,
        "world_size": data_ranks(collectives.world_size(), train.sequence_parallel),
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
