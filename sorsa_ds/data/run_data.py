"""What a run learns from and is measured on: one source or several, stored or streamed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.mixing import check_conversations, of_source, sources_of
from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.chat import end_rendering
from sorsa_ds.data.chat_templates import use_template
from sorsa_ds.data.examples import HELD_OUT, TRAINING, load_examples
from sorsa_ds.data.examples import load_held_out as load_stored
from sorsa_ds.data.held_apart import check_apart, held_out_of
from sorsa_ds.data.mix import WeightedPasses, joined, shares
from sorsa_ds.data.order import Passes, ShuffledPasses
from sorsa_ds.data.stream_encoding import BlockEncoder
from sorsa_ds.data.stream_rows import open_rows
from sorsa_ds.data.streams import ExampleStream, Place, SourceStream
from sorsa_ds.data.token_store import Examples
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.waiting import first_of_node


@dataclass(frozen=True, slots=True)
class StoredData:
    """Examples that are all there before training begins.

    train: the training examples of each source, by its name.
    held_out: the held-out examples of each source that has any, by its name.
    """

    train: dict[str, Examples]
    held_out: dict[str, Examples]

    @property
    def examples(self) -> Examples:
        """The training examples, one source after the other."""
        return joined(list(self.train.values()))


def load_data(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> StoredData:
    """Read and tokenise every source. A collective call.

    Args:
        seed: the seed with which the embedded data are generated.

    Raises:
        ValueError: a source cannot be read, does not fit the format, or holds nothing to learn; in a mix the message
            names it. Or a source holds out rows that another learns, or there are settings of conversations, and no
            source holds any.
    """
    collectives.together(partial(first_of_node, partial(check_apart, data, seed), "reading the data"))
    train, held_out = {}, {}
    for name, source in sources_of(data).items():
        train[name], kept = of_source(data, name, partial(load_examples, source, tokenizer, seed))
        if len(kept):
            held_out[name] = kept
    check_conversations(data, [examples.template for examples in train.values()])
    return StoredData(train, held_out)


def passes_of(data: DataConfig, train: dict[str, Examples], seed: int) -> Passes:
    """The order in which the examples of the sources are learned.

    Args:
        seed: the seed of the order.
    """
    sizes = [len(examples) for examples in train.values()]
    weights = [source.weight for source in data.mix if source.weight is not None]
    if not weights:
        return ShuffledPasses(sum(sizes), seed)
    told = ", ".join(f"{name} {share:.1%}" for name, share in zip(train, shares(weights), strict=True))
    say(f"Each example is drawn from a source by its weight (data.mix): {told}.")
    return WeightedPasses(sizes, weights, seed, data.mix_until)


def open_stream(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    saved: dict | None,
    check: Callable[[Examples], None],
) -> ExampleStream:
    """Open every source as a stream.

    Args:
        seed: the seed of the order.
        saved: what `ExampleStream.state` was when the run was stopped; None for a new run.
        check: stops where examples cannot be learned; asked for each block of them.

    Raises:
        ValueError: a source cannot be read, or does not fit the format; in a mix the message names it.
    """
    if data.chat_template is not None:
        use_template(tokenizer, data.chat_template)
    sources = sources_of(data)
    kinds: dict[str, str] = {}
    numbers = {name: number for number, name in enumerate(sources)}

    def open_source(name: str, place: Place | None) -> SourceStream:
        source = sources[name]
        rows = open_rows(source.path, source.name, source.train_split, "data.path")
        encode = BlockEncoder(source, tokenizer, TRAINING, source.path, source.train_split)

        def checked(rows: list[dict], first: int) -> Examples:
            block = encode(rows, first)
            if len(block):
                kinds[name] = encode.kind
                if len(kinds) == len(sources):
                    check_conversations(data, kinds.values())
                check(block)
            return block

        own = (seed, numbers[name])
        return SourceStream(name, rows, checked, size=data.shuffle_buffer, seed=own, place=place)

    def named(name: str, place: Place | None) -> SourceStream:
        return of_source(data, name, partial(open_source, name, place))

    weights = [source.weight or 1.0 for source in data.mix] or [1.0]
    return ExampleStream(named, dict(zip(sources, weights, strict=True)), seed, saved)


def load_held_out(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Examples]:
    """The held-out examples of each source that has any, by its name.

    Args:
        seed: the seed with which the embedded data are generated.

    Raises:
        ValueError: a source cannot be read, does not fit the format, or holds nothing to learn.
    """
    sources = sources_of(data).items()
    if not data.streaming:
        found = {name: of_source(data, name, partial(load_stored, one, tokenizer, seed)) for name, one in sources}
        return {name: examples for name, examples in found.items() if len(examples)}
    check_apart(data, seed)
    if data.chat_template is not None:
        use_template(tokenizer, data.chat_template)
    return {
        name: of_source(data, name, partial(_streamed_held_out, source, tokenizer))
        for name, source in sources
        if source.eval_size
    }


def _streamed_held_out(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    path, name = held_out_of(data)
    rows = list(islice(open_rows(path, name, data.eval_split, "data.eval_split"), data.eval_size))
    try:
        examples = BlockEncoder(data, tokenizer, HELD_OUT, path, data.eval_split or data.train_split)(rows, 1)
    finally:
        end_rendering()
    if not len(examples):
        reasons = examples.counts.reasons()
        raise ValueError(f"held-out data ({path}): nothing to learn in any of {len(rows)} rows{reasons}")
    return examples
