"""What launch/preview.py shows, and that it is what training would learn."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from transformers import RwkvConfig

from sorsa_ds.config.schema import DataConfig, LoadingConfig, TrainConfig
from sorsa_ds.data import workers
from sorsa_ds.data.examples import load_examples
from sorsa_ds.data.token_store import Examples
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.preview import command
from sorsa_ds.preview.options import Request, parse
from sorsa_ds.preview.padding import levelled_positions, padding_share
from sorsa_ds.preview.report import as_text, coloured
from tests.helpers.forked import outcome_forked
from tests.helpers.projects import ROOT
from tests.helpers.small_data import write_lines

MODEL = ROOT / "tests" / "golden" / "model"
ROWS = [
    {"question": "1+1?", "answer": "Two \x1b[2J."},
    {"question": "2+2?", "answer": " "},
    {"question": "How many in all? " * 40, "answer": "Four."},
    {"question": "3+3?", "answer": "Six."},
]


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """Makes what a command line asks for, on rows in a file and a cache of its own."""
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path / "cache"))
    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    settings = [f"model={MODEL}", f"data.path={file}", "data.eval_size=1", "data.max_length=300"]
    return lambda *words: parse([*settings, *words])


def tokenizer_of(request: Request):
    return load_tokenizer(MODEL, request.config.loading)


def test_json_has_what_training_learns(request_of, capsys, monkeypatch):
    request = request_of("--json", "--examples", "2", "data.truncation=drop")
    command.show(request)
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    monkeypatch.setattr(workers, "encode_rows", None)  # what was shown is there for training
    train, held_out = load_examples(request.config.data, tokenizer_of(request), request.config.train.seed)
    assert (shown["rows"], shown["learned_rows"], shown["cut"]) == (3, 1, 0)
    assert shown["left_out"] == train.counts.left_out
    assert sorted(shown["left_out"]) == [
        "column 'answer', which is to be learned, is blank", "they are longer than data.max_length",
    ]  # fmt: skip
    assert (shown["tokens"], shown["learned_tokens"]) == (train.lengths.sum(), (train[0]["labels"] >= 0).sum())
    assert shown["template"] == "gsm8k"
    assert shown["held_out"]["rows"] == len(held_out) == 1
    [example] = shown["examples"]
    [learned] = example["learned"]
    assert learned == " Two \x1b[2J.<|im_end|>"
    assert example["text"].endswith("1+1?\n\n### Response:" + learned)
    assert len(shown["warnings"]) == 2
    assert all(warning in printed.err for warning in shown["warnings"])


def test_the_table_tells_all_and_no_row_commands_the_terminal(request_of, capsys):
    command.show(request_of())
    printed = capsys.readouterr().out
    assert "--- learned, " in printed
    assert "\x1b" not in printed
    assert printed.count("=== example") == 1
    for told in (
        r"rows read +3\n", r"learned +1, of which 0 are cut\n", r"left out +1: column 'answer'",
        r"left out +1: what data.max_length leaves of them", r"longest \d+\n", r"held out +1 rows, 1 measured, from",
    ):  # fmt: skip
        assert re.search(told, printed), told


def test_what_is_learned_is_told_apart_in_colour(request_of):
    request = request_of()
    train, _ = load_examples(request.config.data, tokenizer_of(request), 0)
    text = coloured(train[0], tokenizer_of(request))
    assert text.endswith("### Response:\x1b[1;32m Two \\x1b[2J.<|im_end|>\x1b[0m")
    assert text.count("\x1b") == 2


def test_a_picture_of_the_lengths(request_of, tmp_path):
    command.show(request_of("--plot", str(tmp_path / "lengths.png"), "--examples", "0"))
    assert (tmp_path / "lengths.png").stat().st_size > 1000
    assert (tmp_path / "lengths.svg").exists()


@pytest.mark.parametrize(("words", "told"), [
    (["--examples", "-1"], "--examples -1: must be a whole number from 0"),
    (["--gpus", "0"], "--gpus 0: must be a whole number from 1"),
    (["data.truncation=middle"], "data.truncation"),
    (["--exmples", "3"], "exmples"),
])  # fmt: skip
def test_a_wrong_command_line_is_refused(words, told):
    with pytest.raises(ValueError, match=told):
        parse(words)


def test_padding_is_counted_as_batches_pad():
    lengths = np.array([4, 1, 3, 2])
    assert padding_share(lengths, 2, 4, grouped=True) == pytest.approx(1 - 10 / 12)  # 4 with 3, and 2 with 1
    assert padding_share(lengths, 1, 4, grouped=False) == 0
    assert padding_share(lengths, 4, 4, grouped=False) == pytest.approx(1 - 10 / 16)
    assert padding_share(np.array([5]), 2, 2, grouped=True) == 0.5
    many = np.arange(1, 513)
    assert padding_share(many, 4, 64, True) < 0.1 < 0.3 < padding_share(many, 4, 64, False)


@pytest.mark.parametrize(("settings", "told"), [
    (TrainConfig(), "micro-batches of 2, grouped by length inside steps of 6"),
    (TrainConfig(micro_batch_size=4, gradient_accumulation_steps=2), "micro-batches of 4, .* inside steps of 24"),
    (TrainConfig(global_batch_size=96), "micro-batches of 2, .* inside steps of 96"),
    (TrainConfig(global_batch_size=96, micro_batch_tokens=60), "batches of up to 60 inside steps of 96, on 3 rank"),
    (TrainConfig(micro_batch_size=4, micro_batch_tokens="auto"), "batches of up to 48 inside steps of 12, on 3 r"),
])  # fmt: skip
def test_padding_is_told_for_the_batches_of_the_run(settings, told):
    ids = np.arange(3, dtype=np.int32)
    examples = Examples.of([{"input_ids": ids, "labels": ids}])
    assert re.search(told, as_text(examples, Examples.of([]), settings, gpus=3, max_length=12))


def test_levelled_padding_is_counted_by_hand():
    found = levelled_positions(np.array([4, 1, 3, 2]), 8, 4, 1)  # 4 with 3, and 2 with 1
    assert (found.tokens, found.computed, found.passes) == (10, 8 + 4, 2)
    assert levelled_positions(np.array([4, 1, 3, 2]), 4, 4, 2).of_passes == 2 * (4 + 2)  # 4 beside 3, then 2 beside 1
    assert levelled_positions(np.full(1000, 2), 4, 4, 1).tokens == 800  # of the first hundred steps


@pytest.mark.slow
def test_refusals_end_with_code_2_and_help_comes_at_once(tmp_path):
    def run(*words):
        return outcome_forked(tmp_path, "launch/preview.py", *words)

    words = ["data.path=no-such.jsonl", f"model={MODEL}", "--json"]
    missing = subprocess.run(  # one as a user starts it
        [sys.executable, "launch/preview.py", *words], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "SORSA_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert missing.returncode == 2
    assert missing.stdout == ""
    assert missing.stderr.lstrip().startswith("error: data.path: no file or folder 'no-such.jsonl' here")
    file = write_lines(tmp_path / "rows.jsonl", [{"question": "?", "answer": True}])
    refused = run(f"data.path={file}", f"model={MODEL}", "data.eval_size=0", "--json")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "rows.jsonl), row 1: column 'answer' holds True" in refused.stderr
    helped = run("--help")
    assert helped.returncode == 0
    assert "--plot" in helped.stdout
    assert "data.truncation" in helped.stdout


def test_defaults_are_those_of_the_settings():
    assert parse([]).config.data == DataConfig()
    assert (parse([]).examples, parse([]).as_json, parse(["--json"]).as_json) == (3, False, True)


def test_a_model_that_cannot_keep_packed_examples_apart_is_refused_as_training_would(request_of, tmp_path):
    folder = tmp_path / "rwkv"
    RwkvConfig(hidden_size=40, attention_hidden_size=40, num_hidden_layers=2, vocab_size=512).save_pretrained(folder)
    load_tokenizer(MODEL, LoadingConfig()).save_pretrained(folder)
    with pytest.raises(ValueError, match="data.packing"):
        command.show(request_of(f"model={folder}", "data.packing=true", "data.max_length=64"))
