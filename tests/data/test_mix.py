"""Several sources as one: whose turn it is, and which example it gives."""

import json
import sys
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
from datasets import Dataset

from sorsa_ds.config.mixing import sources_of
from sorsa_ds.config.schema import DataConfig, MixedSource
from sorsa_ds.data.mix import WeightedPasses, draws, joined
from sorsa_ds.data.order import ShuffledPasses
from sorsa_ds.data.run_data import load_data, load_held_out, passes_of
from sorsa_ds.data.token_store import Examples
from tests.helpers.chat_tokenizer import chat_tokenizer

SIZES, WEIGHTS = [30, 7, 19], [1, 2, 0.5]
STARTS = [0, 30, 37]
SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]


def source_of(index: int) -> int:
    return sum(index >= start for start in STARTS) - 1


def order_of(source: int, number: int) -> list[int]:
    """The order of a source in one of its passes, by the documented seeds."""
    return np.random.default_rng((3, source, number)).permutation(SIZES[source]).tolist()


@pytest.mark.parametrize("until", ["first_exhausted", "all_exhausted"])
def test_an_epoch_is_what_interleave_datasets_gives_of_the_shuffled_sources(until):
    def rows(passes):
        return [
            Dataset.from_dict({"index": [STARTS[s] + i for n in range(passes) for i in order_of(s, n)]})
            for s in range(3)
        ]

    mix = WeightedPasses(SIZES, WEIGHTS, seed=3, until=until)
    expected = datasets.interleave_datasets(rows(1), probabilities=SHARES, seed=3, stopping_strategy=until)["index"]
    found = [mix.index(position) for position in range(len(mix))]
    assert len(mix) == len(expected)
    assert list(map(source_of, found)) == list(map(source_of, expected))
    # Where a source comes again within an epoch, it has another order, which `interleave_datasets` does not give it.
    passes = datasets.interleave_datasets(rows(60), probabilities=SHARES, seed=3, stopping_strategy="first_exhausted")
    assert found == passes["index"][: len(found)]


@pytest.mark.parametrize("until", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize(("sizes", "weights"), [([100, 1], [1, 40]), ([1], [2]), ([500, 500, 1500], [1, 1, 3])])
def test_an_epoch_ends_where_interleave_datasets_ends_it(until, sizes, weights):
    sources = [Dataset.from_dict({"source": [s] * size}) for s, size in enumerate(sizes)]
    chances = [weight / sum(weights) for weight in weights]
    mixed = datasets.interleave_datasets(sources, probabilities=chances, seed=3, stopping_strategy=until)
    mix = WeightedPasses(sizes, weights, seed=3, until=until)
    ends = np.cumsum(sizes)
    assert [int(np.searchsorted(ends, mix.index(place), "right")) for place in range(len(mix))] == mixed[:]["source"]


def test_a_mix_of_many_examples_is_drawn_without_a_call_for_each_of_its_places():
    """A lazy column of `datasets`, read place by place, took hours for the mixes that people have."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        mix = WeightedPasses([60_000, 40_000], [3, 2], seed=0, until="all_exhausted")
    finally:
        sys.setprofile(None)
    assert len(mix) > 100_000 > 10 * calls


def test_later_epochs_go_on_with_each_source_where_the_last_one_left_it():
    mix = WeightedPasses(SIZES, WEIGHTS, seed=3, until="first_exhausted")
    found = [mix.index(position) for position in range(20 * len(mix))]
    for source, size in enumerate(SIZES):
        own = [index - STARTS[source] for index in found if source_of(index) == source]
        expected = [index for number in range(len(own) // size + 1) for index in order_of(source, number)]
        assert own == expected[: len(own)]
    assert [mix.index(position) for position in (7, 200, 7)] == [found[7], found[200], found[7]]


def test_streams_are_drawn_from_as_datasets_draws_from_streams():
    streams = [Dataset.from_dict({"source": [s] * 3000}).to_iterable_dataset() for s in range(3)]
    mixed = datasets.interleave_datasets(streams, probabilities=SHARES, seed=5)
    assert list(islice(draws(WEIGHTS, 5), 2500)) == [row["source"] for row in islice(mixed, 2500)]


@pytest.mark.parametrize(
    "passes", [ShuffledPasses(56, seed=1), WeightedPasses(SIZES, WEIGHTS, seed=1, until="all_exhausted")]
)
@pytest.mark.parametrize("positions", [1, 56, 300])
def test_what_is_taken_of_each_source_is_counted(passes, positions):
    counted = Counter(source_of(passes.index(position)) for position in range(positions))
    assert passes.taken(positions, ends=[30, 37, 56]) == [counted[source] for source in range(3)]


def test_joined_examples_are_those_of_the_parts():
    def part(numbers):
        return Examples.of([{"input_ids": np.full(n, n), "labels": np.full(n, n)} for n in numbers])

    parts = [part([3, 4]), part([9]), part([5, 6, 7])]
    whole = joined(parts)
    assert [example["input_ids"].tolist() for example in whole] == [[n] * n for n in (3, 4, 9, 5, 6, 7)]
    assert whole.lengths.tolist() == [3, 4, 9, 5, 6, 7]
    assert (whole[-1]["labels"][0], len(whole), whole.largest_token, whole.counts.rows) == (7, 6, 9, 6)
    assert whole.digest != joined(parts[::-1]).digest
    for index in (6, -7):
        with pytest.raises(IndexError):
            whole[index]
    assert joined(parts[:1]) is parts[0]
    assert len(joined([])) == 0
    assert [example["labels"].tolist() for example in joined([whole, parts[1]])][-2:] == [[7] * 7, [9] * 9]


@pytest.fixture
def files(tmp_path):
    """A file of 9 stories, one of which is blank, and one of 6 questions."""
    stories, questions = tmp_path / "stories.jsonl", tmp_path / "questions.jsonl"
    stories.write_text("".join(json.dumps({"text": "once " * n}) + "\n" for n in range(9)))
    questions.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(6)))
    return stories, questions


def mix_of(files, **settings) -> DataConfig:
    stories, questions = files
    sources = [MixedSource(path=str(stories), eval_size=2), MixedSource(path=str(questions), weight=None)]
    return DataConfig(mix=sources, eval_size=1, **settings)


def test_each_source_is_read_in_its_own_format_and_holds_out_rows_of_its_own(files):
    data = load_data(mix_of(files), chat_tokenizer(), seed=0)
    assert {name: len(examples) for name, examples in data.train.items()} == {"stories.jsonl": 6, "questions.jsonl": 5}
    assert {name: one.counts.rows for name, one in data.train.items()} == {"stories.jsonl": 7, "questions.jsonl": 5}
    assert {name: len(one) for name, one in data.held_out.items()} == {"stories.jsonl": 2, "questions.jsonl": 1}
    alone = load_data(DataConfig(path=str(files[1]), eval_size=1), chat_tokenizer(), seed=0)
    assert alone.examples.digest == data.train["questions.jsonl"].digest
    assert data.examples.counts.left_out == data.train["stories.jsonl"].counts.left_out != {}
    held_out = load_held_out(mix_of(files), chat_tokenizer(), seed=0)
    assert {name: one.digest for name, one in held_out.items()} == {
        name: one.digest for name, one in data.held_out.items()
    }


def test_without_weights_all_sources_are_one_set(files):
    data = load_data(mix_of(files), chat_tokenizer(), seed=0)
    passes = passes_of(mix_of(files), data.train, seed=4)
    assert [passes.index(position) for position in range(22)] == [
        ShuffledPasses(11, seed=4).index(position) for position in range(22)
    ]


def test_weights_are_told_as_shares(files, capsys):
    stories, questions = map(str, files)
    data = DataConfig(mix=[MixedSource(path=stories, weight=3), MixedSource(path=questions, weight=1)], eval_size=0)
    passes_of(data, load_data(data, chat_tokenizer(), 0).train, seed=0)
    assert "by its weight (data.mix): stories.jsonl 75.0%, questions.jsonl 25.0%." in capsys.readouterr().out


def test_an_error_names_the_source(files):
    files[1].write_text('{"question": "?", "answer": "."}\nnonsense\n')
    with pytest.raises(ValueError, match=r"^data\.mix, questions\.jsonl: .*line 2"):
        load_data(mix_of(files), chat_tokenizer(), seed=0)


def test_sources_of_one_name_are_told_apart(files):
    stories = str(files[0])
    twice = [
        MixedSource(path=stories, train_split="train[:4]"),
        MixedSource(path=stories),
        MixedSource(path="a/b", name="c"),
    ]
    sources = sources_of(DataConfig(mix=twice, train_split="train[4:]", max_length=9))
    assert list(sources) == ["stories.jsonl (1)", "stories.jsonl (2)", "a/b:c"]
    assert [one.train_split for one in sources.values()] == ["train[:4]", "train[4:]", "train[4:]"]
    assert {one.max_length for one in sources.values()} == {9}


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ({"eval_path": "FILE", "path": "OTHER", "eval_size": 2}, {"eval_size": 0}, False),
        ({"eval_size": 2}, {"eval_size": 0}, False),
        ({"eval_size": 0}, {"eval_size": 2}, False),
        ({"eval_size": 2}, {"eval_size": 2}, True),
        ({"train_split": "train[:6]", "eval_size": 2}, {"train_split": "train[5:]", "eval_size": 0}, False),
        ({"train_split": "train[:6]", "eval_size": 2}, {"train_split": "train[6:]", "eval_size": 0}, True),
        ({"eval_size": 2, "path": "FOLDER"}, {"eval_size": 0}, False),
    ],
)
def test_what_one_source_holds_out_is_learned_by_no_other(files, first, second, fits):
    stories, questions = files
    names = {"FILE": str(stories), "OTHER": str(questions), "FOLDER": str(stories.parent)}
    sources = [
        MixedSource(**{"path": str(stories), **{key: names.get(value, value) for key, value in one.items()}})
        for one in (first, second)
    ]
    if first.get("path") == "FOLDER":
        questions.unlink()
    data = DataConfig(mix=sources)
    if fits:
        assert len(load_data(data, chat_tokenizer(), seed=0).held_out) > 0
        return
    with pytest.raises(ValueError, match=r"^data\.mix: .* holds out rows of .*stories\.jsonl that .* learns"):
        load_data(data, chat_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(mix_until="first_exhausted"), "data.mix_until=first_exhausted: .* give every source of data.mix"),
        (dict(mix_until="first_exhausted", mix=[MixedSource(path="a")]), "data.mix_until=first_exhausted: "),
        (dict(shuffle_buffer=5), "data.shuffle_buffer=5: only a stream .*data.streaming: true"),
        (dict(learn="last", format="gsm8k"), r"data.learn: only conversations have that.*\(gsm8k\)"),
        (dict(chat_template="qwen3", prompt="{{ a }}"), r"data.chat_template: .*\(auto, with data.prompt\)"),
        (dict(learn="last", chat_template="qwen3", format="text"), "data.learn, data.chat_template: "),
        (dict(learn="last", mix=[MixedSource(path="a", format="text"), MixedSource(path="b", format="gsm8k")]),
         r"data.learn: .*\(text, gsm8k\)"),
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace("data.", r"data\.")):
        DataConfig(**settings)


@pytest.mark.parametrize("settings", [dict(learn="last"), dict(chat_template="qwen3")])
def test_settings_of_conversations_are_refused_where_the_columns_show_none(files, settings):
    for data in (DataConfig(path=str(files[1]), eval_size=0, **settings), mix_of(files, **settings)):
        with pytest.raises(ValueError, match=r"only conversations have that, and the data are none \(.*gsm8k\)"):
            load_data(data, chat_tokenizer(), seed=0)


@pytest.mark.parametrize("format_", [None, "gsm8k"])
def test_one_source_of_conversations_is_enough(files, tmp_path, format_):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    sources = [MixedSource(path=str(chats), weight=1), MixedSource(path=str(files[1]), weight=1, format=format_)]
    data = DataConfig(mix=sources, eval_size=0, learn="last", mix_until="first_exhausted")
    found = load_data(data, chat_tokenizer(), seed=0)
    assert (found.train["chats.jsonl"][0]["labels"] != -100).sum() < 10
    assert len(found.train["questions.jsonl"]) == 6
