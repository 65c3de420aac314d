"""What a run reads before it loads any weight: tokenizer and examples, checked against the model."""

from dataclasses import dataclass

from sorsa_ds.data.batches import BatchPlan, pad_token_id
from sorsa_ds.data.examples import load_examples
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
from sorsa_ds.train.start_check import check_fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads.

    numerics: what decides the model's numbers besides its weights.
    batches: the micro-batches of every step, for this rank.
    data_digest: digest of the training examples, the same on every rank.
    eval_examples: held-out examples, possibly none.
    stored: the linears to snapshot; empty if `analysis.every` is 0.
    """

    numerics: Numerics
    batches: BatchPlan
    data_digest: str
    eval_examples: list[Example]
    stored: list[Target]


def read_inputs(settings: RunSettings, origin: Origin) -> Inputs:
    """Read the tokenizer and the examples, and check that they fit the model. A collective call.

    Raises:
        ValueError: a tokenizer or data that cannot be read, or that do not belong to the model.
    """
    config, resolved, model_folder = settings.config, settings.resolved, settings.model_folder
    tokenizer = load_tokenizer(model_folder, config.loading)
    numerics = numerics_of(model_folder, config.loading, tokenizer)
    origin.check_numerics(numerics, model_folder, config.loading)
    vocabulary = read_config(model_folder, config.loading).vocab_size
    train_examples, eval_examples = load_examples(config.data, tokenizer, config.train.seed)
    batches = BatchPlan(
        train_examples,
        micro_batch_size=resolved.micro_batch_size,
        accumulation=resolved.gradient_accumulation_steps,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        seed=config.train.seed,
        pad_token_id=pad_token_id(tokenizer, vocabulary),
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    data_digest = batches.digest
    origin.check_data(data_digest)
    check_fits(model_folder, config.loading, [*train_examples, *eval_examples])
    stored = _stored_linears(settings, origin)
    say(show_example(train_examples[0], tokenizer))
    return Inputs(
        numerics=numerics,
        batches=batches,
        data_digest=data_digest,
        eval_examples=eval_examples,
        stored=stored,
    )


def _stored_linears(settings: RunSettings, origin: Origin) -> list[Target]:
    """The linears of which snapshots will be taken, checked against the snapshots that are there."""
    config = settings.config
    if not config.analysis.every:
        return []
    model = skeleton(settings.model_folder, config.loading)
    stored = stored_linears(model, config)
    origin.check_snapshots(model, config, settings.device)
    return stored
