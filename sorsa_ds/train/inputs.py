"""What a run reads before it loads any weight: tokenizer and examples, checked against the model."""

from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.data.batches import BatchPlan, pad_token_id
from sorsa_ds.data.examples import load_examples
from sorsa_ds.data.tokenize import Example, show_example
from sorsa_ds.model.numerics import Numerics, numerics_of
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.plan.check import check_memory
from sorsa_ds.run.snapshots import stored_linears
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.train.origin import Origin
from sorsa_ds.train.settings import RunSettings
from sorsa_ds.train.start_check import check_fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads.

    model_folder: where the pre-trained model lies on this machine.
    numerics: what decides that model's numbers besides its weights.
    batches: the micro-batches of every step, for this rank.
    data_digest: digest of the training examples, the same on every rank.
    eval_examples: held-out examples, possibly none.
    stored: the linears to snapshot; empty if `analysis.every` is 0.
    """

    model_folder: Path
    numerics: Numerics
    batches: BatchPlan
    data_digest: str
    eval_examples: list[Example]
    stored: list[Target]


def read_inputs(settings: RunSettings, origin: Origin) -> Inputs:
    """Find the model, read the examples, and check that both fit each other and this machine. A collective call.

    Raises:
        ValueError: a model or data that cannot be found or read, that do not belong together, or that do not fit.
    """
    config, resolved = settings.config, settings.resolved
    model_folder = find_model(config.model, config.loading)
    tokenizer = load_tokenizer(model_folder, config.loading)
    numerics = numerics_of(model_folder, config.loading, tokenizer)
    origin.check_numerics(numerics, model_folder, config.loading)
    train_examples, eval_examples = load_examples(config.data, tokenizer, config.train.seed)
    batches = BatchPlan(
        train_examples,
        micro_batch_size=resolved.micro_batch_size,
        accumulation=resolved.gradient_accumulation_steps,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        seed=config.train.seed,
        pad_token_id=pad_token_id(tokenizer),
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    data_digest = batches.digest
    origin.check_data(data_digest)
    check_fits(model_folder, config.loading, [*train_examples, *eval_examples])
    check_memory(model_folder, config, settings.ds_config, resolved, settings.formats, settings.storage)
    stored = _stored_linears(model_folder, settings, origin)
    say(show_example(train_examples[0], tokenizer))
    return Inputs(
        model_folder=model_folder,
        numerics=numerics,
        batches=batches,
        data_digest=data_digest,
        eval_examples=eval_examples,
        stored=stored,
    )


def _stored_linears(model_folder: Path, settings: RunSettings, origin: Origin) -> list[Target]:
    """The linears of which snapshots will be taken, checked against the snapshots that are there."""
    config = settings.config
    if not config.analysis.every:
        return []
    model = skeleton(model_folder, config.loading)
    stored = stored_linears(model, config)
    origin.check_snapshots(model, config, settings.device)
    return stored
