"""Rows that are read while training goes on: which examples come when, and going on in the middle."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from sorsa_ds.config.schema import DataConfig, MixedSource
from sorsa_ds.data.mix import draws
from sorsa_ds.data.run_data import load_held_out, open_stream
from sorsa_ds.data.source import load_rows
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.data.stream_encoding import BlockEncoder
from sorsa_ds.data.stream_rows import PLACE, open_rows
from sorsa_ds.runtime import collectives
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.worlds import run_ranks

BUFFER, SEED, STEPS = 8, 5, 20
KINDS = ["jsonl", "json", "csv", "parquet", "folder", "saved"]


def rows_of(letter: str, count: int) -> list[dict[str, str]]:
    """Rows whose text says which they are; every seventh is blank, and so no example."""
    return [{"text": "" if n % 7 == 3 else f"{letter}{n} " + "x " * (n % 5)} for n in range(count)]


def write(folder, name: str, rows: list[dict[str, str]]):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data(tmp_path):
    """A stream of two sources: a file of 21 rows, and a folder of 9 rows in two files."""
    one = write(tmp_path, "one.jsonl", rows_of("a", 21))
    two = tmp_path / "two"
    two.mkdir()
    write(two, "1.jsonl", rows_of("b", 9)[:6])
    write(two, "2.jsonl", rows_of("b", 9)[6:])
    return DataConfig(
        mix=[MixedSource(path=str(one), weight=3), MixedSource(path=str(two), weight=1)],
        streaming=True,
        shuffle_buffer=BUFFER,
        eval_size=0,
    )


def stream_of(data, saved=None, check=lambda examples: None):
    return open_stream(data, chat_tokenizer(), SEED, saved, check)


def batches_of(data, saved=None, rank=0, world=1, micro=2, accumulation=3, tokens=None):
    return StreamBatches(
        stream_of(data, saved), micro_batch_size=micro, accumulation=accumulation, rank=rank, world_size=world,
        pad_token_id=0, steps=STEPS, device=torch.device("cpu"), micro_batch_tokens=tokens,
    )  # fmt: skip


def texts(examples) -> list[str]:
    """The first word of each example."""
    return [chat_tokenizer().decode(example["input_ids"]).split()[0] for example in examples]


def expected_of(letter: str, source: int, count: int, passes: int) -> list[str]:
    """The order of a source by hand: its blocks, each without blank rows, in an order by seed, source, pass and row."""
    found = []
    for number in range(passes):
        for start in range(0, count, BUFFER):
            block = [f"{letter}{n}" for n in range(start, min(start + BUFFER, count)) if n % 7 != 3]
            order = np.random.default_rng((SEED, source, number, start)).permutation(len(block))
            found += [block[place] for place in order]
    return found


def test_each_source_comes_block_by_block_pass_after_pass_when_it_is_drawn(data):
    found = texts(stream_of(data).take(120))
    own = [iter(expected_of("a", 0, 21, 9)), iter(expected_of("b", 1, 9, 9))]
    assert found == [next(own[source]) for source in islice(draws([3, 1], SEED), 120)]


def test_a_buffer_of_one_keeps_the_order_of_the_rows(tmp_path):
    file = write(tmp_path, "one.jsonl", rows_of("a", 10))
    data = DataConfig(path=str(file), streaming=True, shuffle_buffer=1, eval_size=0)
    kept = [f"a{n}" for n in range(10) if n % 7 != 3]
    assert texts(stream_of(data).take(20)) == (kept * 3)[:20]


@pytest.mark.parametrize("stopped", [0, 1, 4, 11, 18])
def test_a_stopped_stream_goes_on_bit_for_bit(data, stopped):
    whole = batches_of(data)
    batches, states = [], []
    for step in range(STEPS):
        batches.append(whole.micro_batches(step))
        states.append(json.loads(json.dumps(whole.state)))
    again = batches_of(data, states[stopped])
    for step in range(stopped + 1, STEPS):
        for one, other in zip(again.micro_batches(step), batches[step], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)
    assert again.state == whole.state
    assert again.taken == whole.taken


@pytest.mark.parametrize("tokens", [None, 12])
@pytest.mark.parametrize(("world", "micro"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_a_steps_examples_do_not_depend_on_the_ranks(data, world, micro, tokens):
    """With 12 positions of a micro-batch too, in which an example that is longer is alone."""
    stream = stream_of(data)
    ranks = [batches_of(data, None, rank, world, micro, 1, tokens) for rank in range(world)]
    for step in range(6):
        rows = [
            row[mask == 1].tolist()
            for rank in ranks
            for batch in rank.micro_batches(step)
            for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ]
        assert sorted(rows) == sorted(example["input_ids"].tolist() for example in stream.take(6))
        assert len({len(rank.micro_batches(step)) for rank in ranks}) == 1
        if tokens is not None:
            shapes = [batch["labels"].shape for rank in ranks for batch in rank.micro_batches(step)]
            assert all(shape.numel() <= tokens or shape[0] == 1 for shape in shapes)


def test_a_step_can_be_asked_for_again(data):
    batches = batches_of(data)
    first = batches.micro_batches(0)
    assert all(
        torch.equal(one["labels"], other["labels"]) for one, other in zip(first, batches.micro_batches(0), strict=True)
    )
    assert not torch.equal(batches.micro_batches(1)[0]["labels"], first[0]["labels"])


def test_rows_are_counted_by_source_and_passes_are_told(data, capsys):
    batches = batches_of(data)
    for step in range(STEPS):
        batches.micro_batches(step)
    drawn = list(islice(draws([3, 1], SEED), STEPS * 6))
    one, two = batches.taken["one.jsonl"], batches.taken["two"]
    assert (one.examples, two.examples) == (drawn.count(0), drawn.count(1))
    # A pass of the first file is blocks of 8, 8 and 5 rows with 7, 7 and 4 examples.
    passes, rest = divmod(one.examples, 18)
    blocks = (rest > 0) + (rest > 7) + (rest > 14)
    assert one.counts.rows == passes * 21 + [0, 8, 16, 21][blocks]
    assert list(one.counts.left_out.values()) == [one.counts.rows - one.counts.learned_rows]
    told = capsys.readouterr().out
    assert "one.jsonl: all 21 rows are read; its pass 2 begins." in told
    assert "two: all 9 rows are read; its pass 3 begins." in told


def test_other_rows_than_those_that_were_there_are_refused(data, tmp_path):
    stream = stream_of(data)
    stream.take(30)
    changed = rows_of("a", 21)
    place = stream.state["places"]["one.jsonl"]
    changed[place["row"]] = {"text": "another"}
    write(tmp_path, "one.jsonl", changed)
    with pytest.raises(ValueError, match=rf"one\.jsonl: the rows from row {place['row'] + 1} on are not those"):
        stream_of(data, stream.state)


def test_a_whole_pass_with_nothing_to_learn_is_an_error_and_no_endless_loop(tmp_path):
    file = write(tmp_path, "blank.jsonl", [{"text": " "}] * 20)
    data = DataConfig(path=str(file), streaming=True, shuffle_buffer=8, eval_size=0)
    with pytest.raises(ValueError, match=r"^blank\.jsonl: nothing to learn in any of its 20 rows \(.*: 20\)$"):
        stream_of(data).take(1)


def test_a_broken_row_is_named_when_it_is_reached_on_the_step_that_needs_it(tmp_path):
    file = write(tmp_path, "one.jsonl", rows_of("a", 20))
    file.write_text(file.read_text() + "nonsense\n")
    data = DataConfig(path=str(file), streaming=True, shuffle_buffer=8, eval_size=0)
    batches = batches_of(data)
    batches.micro_batches(0), batches.micro_batches(1)
    with pytest.raises(ValueError, match=r"^one\.jsonl: cannot be read behind row 16: .*one\.jsonl, line 21"):
        batches.micro_batches(2)


def test_a_row_that_cannot_be_rendered_is_named_by_its_number(tmp_path):
    rows = [*rows_of("a", 12), {"text": ["no text"]}]
    data = DataConfig(path=str(write(tmp_path, "one.jsonl", rows)), streaming=True, shuffle_buffer=8, eval_size=0)
    said = r"training data \(.*one\.jsonl\), row 13 \(.*one\.jsonl, row 13\): column 'text' holds \['no text'\]"
    with pytest.raises(ValueError, match=said):
        stream_of(data).take(12)


def test_a_row_of_a_folder_is_named_by_its_file_and_its_row_in_it(data, tmp_path):
    write(tmp_path / "two", "2.jsonl", [*rows_of("b", 9)[6:], {"text": False}])
    with pytest.raises(ValueError, match=r"training data \(.*two\), row 10 \(.*two/2\.jsonl, row 4\): column 'text'"):
        stream_of(data).take(100)


def test_rows_of_a_split_that_is_in_no_file_here_are_named_by_it(tmp_path):
    encode = BlockEncoder(DataConfig(), chat_tokenizer(), "training", "a/b", "test")
    with pytest.raises(ValueError, match=r"^training data \(a/b\), row 9 \(split test, row 9\): column 'text'"):
        encode([{"text": "x"}, {"text": False}], 8)


def test_parquet_files_whose_types_differ_are_streamed_as_they_are_stored(tmp_path, capsys):
    from datasets import Dataset

    folder = tmp_path / "parts"
    folder.mkdir()
    for name, rows in (
        ("1", [{"text": 1, "other": "x"}]),
        ("2", [{"text": "b", "other": 2.5, "new": None}, {"text": "c", "new": "y"}]),
    ):
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    streamed = [
        {name: cell for name, cell in row.items() if name != PLACE}
        for row in open_rows(str(folder), None, None, "data.path")
    ]
    stored, _ = load_rows(DataConfig(path=str(folder), eval_size=0), 0)
    assert (
        streamed == list(stored) == [{"text": text, "new": new} for text, new in (("1", None), ("b", None), ("c", "y"))]
    )
    assert capsys.readouterr().out.count("Columns whose types differ from file to file are left out: other") == 2


def test_each_block_is_checked_against_the_model(data):
    sizes = []
    stream_of(data, check=lambda examples: sizes.append(len(examples))).take(12)
    assert sizes[:2] == [7, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_rows_and_goes_on_in_them(tmp_path, kind):
    from datasets import Dataset

    rows = [{"text": f"{n:03}", "kind": None if n % 2 else "a"} for n in range(25)]
    place = tmp_path / f"a.{kind}"
    if kind == "folder":
        place.mkdir()
        for part in range(3):
            write(place, f"{part}.jsonl", rows[10 * part : 10 * part + 10])
    elif kind == "json":
        place.write_text(json.dumps(rows))
    elif kind == "csv":
        place.write_text("text,kind\n" + "".join(f"{row['text']},{row['kind'] or ''}\n" for row in rows))
    elif kind == "jsonl":
        write(tmp_path, place.name, rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(place)
    else:
        Dataset.from_list(rows).save_to_disk(place)
    stream = open_rows(str(place), None, "train", "data.path")
    reading = iter(stream)
    found = [next(reading)["text"] for _ in range(13)]
    again = open_rows(str(place), None, "train", "data.path")
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert found + [row["text"] for row in again] == [row["text"] for row in rows]


def test_columns_that_come_later_are_read_and_those_that_are_missing_are_empty(tmp_path):
    rows = [{"instruction": "a", "output": "b"}] * 9 + [{"instruction": "c", "input": "context", "output": "d"}]
    data = DataConfig(path=str(write(tmp_path, "a.jsonl", rows)), streaming=True, shuffle_buffer=5, eval_size=0)
    found = [chat_tokenizer().decode(example["input_ids"]) for example in stream_of(data).take(10)]
    assert sum("### Input:\ncontext" in text for text in found) == 1
    rows.append({"messages": [{"role": "user", "content": "?"}]})
    data = DataConfig(path=str(write(tmp_path, "a.jsonl", rows)), streaming=True, shuffle_buffer=10, eval_size=0)
    with pytest.raises(
        ValueError, match="from row 11 on there are other columns .'messages'.*would be chat, no longer al"
    ):
        stream_of(data).take(11)


def test_held_out_rows_are_the_first_of_what_is_named(data, tmp_path):
    held_out = write(tmp_path, "held_out.jsonl", rows_of("h", 9))
    one, two = data.mix
    source = MixedSource(path=one.path, weight=1, eval_path=str(held_out), eval_size=5)
    found = load_held_out(DataConfig(mix=[source, two], eval_size=0, streaming=True), chat_tokenizer(), seed=0)
    assert list(found) == ["one.jsonl"]
    assert texts(found["one.jsonl"]) == ["h0", "h1", "h2", "h4"]
    assert (found["one.jsonl"].counts.rows, found["one.jsonl"].counts.source) == (5, str(held_out))
    same = DataConfig(path=one.path, eval_split="train", streaming=True)
    (tmp_path / "link.jsonl").symlink_to(one.path)
    for config in (same, DataConfig(path=one.path, eval_path=str(tmp_path / "link.jsonl"), streaming=True)):
        with pytest.raises(ValueError, match=r"data\.eval_split: train is learned"):
            load_held_out(config, chat_tokenizer(), seed=0)
    mixed = [
        MixedSource(path=two.path, weight=1, eval_path=one.path, eval_size=1),
        MixedSource(path=one.path, weight=1),
    ]
    with pytest.raises(ValueError, match=r"data\.mix: two holds out rows of .*one\.jsonl that one\.jsonl learns"):
        load_held_out(DataConfig(mix=mixed, eval_size=0, streaming=True), chat_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(path="FILE"), "data.eval_size: the last rows of a stream cannot be held out"),
        (dict(path="FILE", eval_size=0, train_split="train[:9]"), "data.train_split: a stream is a whole split"),
        (dict(path="FILE", eval_size=0, mix_until="first_exhausted"), "data.mix_until: a stream has no epochs"),
        (dict(eval_size=0), "data.path: word-problems are generated, and no stream"),
        (dict(mix=[MixedSource(path="a"), MixedSource(path="b")], eval_size=0), "data.mix: a stream has no length"),
        (dict(mix=[MixedSource(path="a", weight=1)]), "data.mix, a: eval_size: the last rows of a stream cannot be"),
    ],
)
def test_settings_that_a_stream_cannot_fulfil_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        DataConfig(streaming=True, **settings)


def test_settings_of_conversations_are_refused_when_no_source_of_a_stream_holds_any(data):
    mix = [*data.mix, MixedSource(path=data.mix[0].path, format="text", weight=1)]
    data = DataConfig(mix=mix, streaming=True, eval_size=0, learn="last")
    with pytest.raises(ValueError, match=r"data\.learn: only conversations have that.*\(text, text, text\)"):
        list(islice(batches_of(data), 60))


@pytest.mark.parametrize(
    ("split", "said"),
    [("test", "there is no split test in .*; say which to take: train"), (None, "^$")],
)
def test_a_split_that_is_not_there_is_named(tmp_path, split, said):
    file = write(tmp_path, "one.jsonl", rows_of("a", 3))
    if split is None:
        assert len(list(open_rows(str(file), None, None, "data.path"))) == 3
        return
    with pytest.raises(ValueError, match=said):
        open_rows(str(file), None, split, "data.path")


def _of_one_rank(files: list[str]) -> list[str]:
    """What a rank says at each of its steps, where each rank has a file of its own."""
    rank, said = collectives.rank(), []
    data = DataConfig(path=files[rank], streaming=True, shuffle_buffer=4, eval_size=0)
    batches = batches_of(data, None, rank, world=2, micro=1, accumulation=2)
    for step in range(3):
        try:
            said.append(str(len(batches.micro_batches(step))))
        except Exception as error:
            return [*said, f"{type(error).__name__}: {error}"]
    return said


@pytest.mark.slow
@pytest.mark.parametrize(("other", "steps"), [("same", 3), ("other", 1), ("broken", 0)])
def test_ranks_that_read_different_rows_are_all_stopped_at_the_step_that_differs(tmp_path, other, steps):
    rows = rows_of("a", 14)
    changed = {"same": rows[6], "other": {"text": "another"}, "broken": {"text": False}}[other]
    files = [
        str(write(tmp_path, f"{number}.jsonl", [*rows[:6], row, *rows[7:]]))
        for number, row in enumerate([rows[6], changed])
    ]
    told = run_ranks(2, _of_one_rank, files, timeout=60)
    assert [one[:steps] for one in told] == [["2"] * steps] * 2
    if other == "other":
        assert all(
            "ValueError: what a step takes of the streamed data is not the same on all" in one[-1] for one in told
        )
    if other == "broken":
        assert told[0][-1].startswith(
            "PeerError: stopped because another rank failed: rank 1: ValueError: training data"
        )
