"""The examples of a run, and what a user is told of rows that are not learned whole."""

import json
import os

import pytest

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import workers
from sorsa_ds.data.examples import load_examples
from sorsa_ds.runtime import collectives
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.worlds import run_ranks


@pytest.fixture
def stories(tmp_path):
    """Five training rows and two held-out rows; two and one of them are long, and one teaches nothing."""
    texts = {"train": ["once", "once " * 30, "", "once " * 40, "twice"], "held_out": ["once", "once " * 30]}
    files = {}
    for name, rows in texts.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return files


def test_rows_that_are_cut_or_left_out_are_counted(stories, capsys):
    data = DataConfig(path=str(stories["train"]), eval_path=str(stories["held_out"]), max_length=20)
    train, held_out = load_examples(data, chat_tokenizer(), seed=0)
    assert (len(train), len(held_out)) == (4, 2)
    assert capsys.readouterr().out.splitlines() == [
        "2 of 5 training examples are cut at 20 tokens (data.max_length).",
        "1 of 5 training examples are left out: column 'text', which is to be learned, is blank.",
        "1 of 2 held-out examples are cut at 20 tokens (data.max_length).",
    ]


def test_errors_name_the_file_and_the_row(stories):
    with stories["held_out"].open("a") as file:
        file.write(json.dumps({"text": True}) + "\n")
    data = DataConfig(path=str(stories["train"]), eval_path=str(stories["held_out"]))
    with pytest.raises(ValueError, match=r"^held-out data \(.*held_out\.jsonl\), row 3: column 'text' holds True"):
        load_examples(data, chat_tokenizer(), seed=0)


def test_a_process_that_cannot_be_started_is_no_folder_that_cannot_be_written(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))

    def refuse(*_):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers, "_here", refuse)
    with pytest.raises(
        ValueError, match=r"^training data \(.*\): a process for it cannot be started or reached: .*avail"
    ):
        load_examples(DataConfig(path=str(stories["train"]), eval_size=0), chat_tokenizer(), seed=0)


def _failure_on_one_of_two_nodes(files: list[str], cache: str) -> str:
    """What each rank, which is the only one of its node, says where only one of them can read its data."""
    rank = collectives.rank()
    os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0", SORSA_CACHE=cache)
    try:
        load_examples(DataConfig(path=files[rank], eval_size=0), chat_tokenizer(), seed=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.slow
def test_a_failure_of_one_node_stops_the_others_at_once(stories, tmp_path):
    files = [str(tmp_path / "absent.jsonl"), str(stories["train"])]
    first, second = run_ranks(2, _failure_on_one_of_two_nodes, files, str(tmp_path / "cache"), timeout=60)
    assert first.startswith("ValueError: data.path: no file or folder")
    assert second == f"PeerError: stopped because another rank failed: rank 0: {first}"
