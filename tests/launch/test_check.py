"""The command `check`: as a person types it, and as the scripts of launch/ call it."""

import pytest

from sorsa_ds.cli.check import _check, _ranks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "sorsa check: name the command that is to be checked, train or evaluate"),
        (["trian"], r"sorsa check knows no command trian: did you mean sorsa check train\?"),
        (["export"], "sorsa check knows no command export: it checks train and evaluate"),
        (["train", "8"], "sorsa check train 8: two numbers are needed.*--gpus N"),
        (["train", "0", "0"], "sorsa check train 0 0: two numbers are needed, RANKS from 1"),
        (["train", "--gpus", "none"], "--gpus is 'none': a whole number from 1 is needed"),
        (["train", "lora_r=16"], "unknown setting lora_r: here it is adapter.rank"),
        (["train", "2", "2", "train.global_batch_size=3"], "train.global_batch_size"),
        (["train", "--gpus", "2", "train.global_batch_size=3"], "train.global_batch_size"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(words, message):
    with pytest.raises(ValueError, match=message):
        _check(words)


def test_its_help_is_its_own(capsys):
    _check(["--help"])
    assert "sorsa check train [--gpus N]" in capsys.readouterr().out


def test_a_right_command_is_answered_by_the_name_of_its_run(capsys):
    _check(["train", "--gpus", "1", "output.name=mine", "train.global_batch_size=3"])
    assert capsys.readouterr().out == "mine\n"


def test_the_ranks_are_those_that_sorsa_train_would_start(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert _ranks(["a=b"]) == (2, 2, ["a=b"])
    assert _ranks(["--gpus", "8", "a=b"]) == (8, 8, ["a=b"])
    assert _ranks(["16", "8", "a=b"]) == (16, 8, ["a=b"])
    assert _ranks(["3", "0"]) == (3, 0, [])
    assert _ranks(["--gpus=1", "a=b"]) == (1, 1, ["--ds_config", "ds_configs/stage0.json", "a=b"])
    assert _ranks(["--gpus=1", "--resume", "auto"]) == (1, 1, ["--resume", "auto"])
