"""Tokens are made once: what a later start reads, what makes them anew, and what a kill leaves."""

import importlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import examples, token_cache, workers
from sorsa_ds.data.counts import Counts
from sorsa_ds.data.examples import load_examples, load_held_out
from sorsa_ds.data.token_store import Examples, opened, store
from sorsa_ds.data.tokenize import Encoded, encode_all
from sorsa_ds.runtime import digest
from tests.helpers.chat_tokenizer import CHATML, chat_tokenizer
from tests.helpers.rendering import layout
from tests.helpers.small_data import write_lines
from tests.helpers.worlds import FORK, run_ranks

ROWS = [{"question": f"{number}+1?", "answer": f"{number + 1}, of course"} for number in range(40)]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path, cache) -> DataConfig:
    """Rows in a file, of which some are held out."""
    return DataConfig(path=str(write_lines(tmp_path / "rows.jsonl", ROWS)), eval_size=4)


def load(data: DataConfig, tokenizer=None) -> tuple[Examples, Examples]:
    """The examples of a run of its own."""
    return load_examples(data, tokenizer or chat_tokenizer(), seed=0)


def kept(cache: Path) -> set[str]:
    """The names of what is in the cache."""
    return {path.name for path in cache.iterdir() if path.is_dir()} if cache.is_dir() else set()


def same(one, other) -> bool:
    """Whether two lists of examples are equal."""
    return [{key: value.tolist() for key, value in example.items()} for example in one] == [
        {key: value.tolist() for key, value in example.items()} for example in other
    ]


def refuse(*_):
    """Stands for the tokenising where nothing must be tokenised."""
    raise AssertionError("rows are tokenised")


def test_examples_are_those_that_tokenising_gives(data):
    train, held_out = load(data)
    rows = Dataset.from_list(ROWS)
    found = encode_all(rows, layout("auto", rows), chat_tokenizer(), data.max_length, "rows").examples
    assert same([*train, *held_out], found)
    assert train.lengths.tolist() == [len(example["labels"]) for example in found[:36]]
    assert same([train[-1]], [found[35]])
    with pytest.raises(IndexError):
        train[36]
    assert train.largest_token == max(example["input_ids"].max() for example in found[:36])


def test_the_digest_is_the_one_that_earlier_versions_have_written(data):
    train, _ = load(data)
    numbers = b"".join(np.asarray(example[key]).tobytes() for example in train for key in ("input_ids", "labels"))
    assert train.digest == digest.of_bytes(numbers) == Examples.of(train).digest


def test_a_second_start_tokenises_nothing_and_says_the_same(data, monkeypatch, capsys):
    longest = int(load(data)[0].lengths.max())
    data = replace(data, max_length=longest - 1)
    first = load(data)
    told = capsys.readouterr().out
    monkeypatch.setattr(workers, "encode_rows", refuse)
    second = load(data)
    assert capsys.readouterr().out == told
    assert f"training examples are cut at {longest - 1} tokens" in told
    for one, other in zip(first, second, strict=True):
        assert same(one, other)
        assert (one.digest, one.counts, one.template) == (other.digest, other.counts, other.template)
    assert same(load_held_out(data, chat_tokenizer(), 0), first[1])


def test_held_out_examples_alone_do_not_tokenise_the_others(data, cache):
    assert len(load_held_out(data, chat_tokenizer(), 0)) == 4
    assert len(kept(cache)) == 1


def marked(tokenizer):
    """The tokenizer with another template."""
    tokenizer.chat_template = CHATML + " "
    return tokenizer


def grown(tokenizer):
    """The tokenizer with a token more."""
    tokenizer.add_tokens(["course"])
    return tokenizer


@pytest.mark.parametrize("changed", [
    {"rows": [*ROWS[:3], {**ROWS[3], "answer": "5"}, *ROWS[4:]]},
    {"rows": ROWS[::-1]},
    {"data": {"max_length": 200}},
    {"data": {"truncation": "left"}},
    {"data": {"prompt": "{{ question }}"}},
    {"tokenizer": marked},
    {"tokenizer": grown},
    {"code": "another version"},
], ids=["a row", "the order", "length", "truncation", "prompt", "template", "vocabulary", "code"])  # fmt: skip
def test_what_decides_tokens_makes_them_anew(changed, data, cache, monkeypatch):
    load(data)
    before = kept(cache)
    assert len(before) == 2
    write_lines(Path(data.path), changed.get("rows", ROWS))
    if "code" in changed:
        monkeypatch.setattr(token_cache, "_digest_of_code", lambda: changed["code"])
    load(replace(data, **changed.get("data", {})), changed.get("tokenizer", lambda same: same)(chat_tokenizer()))
    of_held_out = changed.get("rows", ROWS)[36:] != ROWS[36:] or "rows" not in changed
    assert len(kept(cache) - before) == 1 + of_held_out


def test_what_only_says_where_rows_lie_makes_nothing_anew(data, cache, tmp_path):
    load(data)
    before = kept(cache)
    other = write_lines(tmp_path / "elsewhere" / "copy.jsonl", ROWS)
    load(replace(data, path=str(other), train_split="train[:]"))
    assert kept(cache) == before


def test_a_change_in_any_module_of_the_room_is_another_code(tmp_path):
    room = shutil.copytree(Path(token_cache.__file__).parent, tmp_path / "data")
    before = token_cache._digest_of_code()
    assert token_cache._digest_of_code(room) == before
    for file in room.glob("*.py"):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert token_cache._digest_of_code(room) != before
        file.write_bytes(content)
    (room / "chat.py").rename(room / "talk.py")
    assert token_cache._digest_of_code(room) != before


def test_the_code_that_a_tokenizer_brings_decides_its_tokens_too(tmp_path, monkeypatch):
    code = (
        "from transformers import PreTrainedTokenizerFast\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (tmp_path / "own_tokenizer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_tokenizer").OwnTokenizer(tokenizer_object=chat_tokenizer()._tokenizer)
    found = {token_cache.digest_of_tokenizer(own)}
    for changed in ("own_tokenizer.py", "beside.py"):
        (tmp_path / changed).write_text(f"{code}# changed\n")
        found.add(token_cache.digest_of_tokenizer(own))
    assert len(found) == 3


def test_a_killed_process_leaves_no_half_cache(data, cache, monkeypatch):
    def killed(*_):
        yield Encoded([], *(0 for _ in range(len(Encoded._fields) - 1)))
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(examples, "encode_in_parts", killed)
        patch.setattr(examples, "store", lambda folder, parts, template: [(folder / "tokens.bin").touch(), *parts])
        child = FORK.Process(target=load, args=(data,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    [left] = kept(cache)
    assert left.endswith(".tmp")
    assert len(load(data)[0]) == 36
    assert not any(name.endswith(".tmp") for name in kept(cache))


def test_rows_that_are_refused_leave_nothing(data, cache):
    write_lines(Path(data.path), [*ROWS, {"question": "?", "answer": True}, *ROWS[:4]])
    with pytest.raises(ValueError, match=r"^training data \(.*rows\.jsonl\), row 41: column 'answer' holds True"):
        load(data)
    write_lines(Path(data.path), [{"question": "?", "answer": ""}] * 8)
    with pytest.raises(ValueError, match=r"no token to learn in any of 4 rows \(column 'answer'.* is blank: 4\)"):
        load(data)
    assert not kept(cache)


def test_a_cache_that_cannot_be_written_is_named(data, cache):
    cache.parent.write_text("a file where a folder is needed")
    with pytest.raises(ValueError, match=r"cache/tokens/.* cannot be written \(.*SORSA_CACHE"):
        load(data)


def test_a_cache_that_was_cut_off_is_named(data, cache):
    train, _ = load(data)
    for tokens in cache.glob("*/tokens.bin"):
        os.truncate(tokens, 40)
    with pytest.raises(ValueError, match=r"tokens\.bin: is cut off; remove its folder"):
        train[20]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokens.bin", None), ("lengths.npy", None), ("lengths.npy", b""), ("facts.json", b"{}"), ("facts.json", b"[]"),
        ("facts.json", b"{"),
    ],
)  # fmt: skip
def test_a_cache_that_was_changed_is_named_with_the_way_to_make_it_again(data, cache, file, content):
    load(data)
    for stored in cache.glob(f"*/{file}"):
        changed = bytearray(stored.read_bytes())
        changed[-1] ^= 1
        stored.write_bytes(bytes(changed) if content is None else content)
    with pytest.raises(
        ValueError, match=r"cache/tokens/.* are damaged \(.*; remove this folder, and they will be made"
    ):
        load(data)
    shutil.rmtree(cache)
    assert len(load(data)[0]) == 36


def told_by_a_rank(data: DataConfig, log: Path) -> tuple[str, int, int]:
    """What a rank has got; each time that rows are tokenised, a line is added to the log."""
    tokenise = examples.encode_in_parts

    def logged(*arguments):
        with log.open("a") as file:
            file.write("tokenised\n")
        return tokenise(*arguments)

    examples.encode_in_parts = logged
    train, held_out = load(data)
    return train.digest, len(train), len(held_out)


@pytest.mark.slow
def test_one_rank_of_a_node_tokenises_for_all(data, tmp_path):
    first, second = run_ranks(2, told_by_a_rank, data, tmp_path / "log")
    assert first == second == (load(data)[0].digest, 36, 4)
    assert (tmp_path / "log").read_text().splitlines() == ["tokenised"] * 2


def refused_on_a_node(paths: list[str]) -> str:
    """What a rank says, each of which is a node of its own and reads a file of its own."""
    own = os.environ["RANK"]
    os.environ.update(LOCAL_RANK="0", CROSS_RANK=own)
    with pytest.raises(ValueError) as caught:
        load(DataConfig(path=paths[int(own)]))
    return str(caught.value)


@pytest.mark.slow
def test_nodes_with_different_data_are_refused(data, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", [{**ROWS[0], "answer": "2"}, *ROWS[1:]])
    told = run_ranks(2, refused_on_a_node, [data.path, str(other)])
    assert all("is not the same on all nodes" in text for text in told)
    assert "training data" in told[0]


def made_up(rows: int, length: int):
    """Parts of a data set of so many rows."""
    ids = np.arange(length, dtype=np.int32)
    for _ in range(rows // 1000):
        yield Encoded([{"input_ids": ids, "labels": ids}] * 1000, {}, 0, {})


def test_examples_take_twelve_bytes_of_memory_whatever_their_length(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(Encoded, "counts", property(lambda self: Counts(rows=1000, learned_rows=1000)))
    store(tmp_path, made_up(20_000, 50), "text")
    tracemalloc.start()
    found = opened(tmp_path, "made up")
    for index in range(0, len(found), 7):
        assert len(found[index]["labels"]) == 50
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 20_000
    assert taken < 12 * 20_000 + 50_000
    assert (tmp_path / "tokens.bin").stat().st_size == 20_000 * 50 * 8
    assert json.loads((tmp_path / "facts.json").read_text())["largest_token"] == 49
