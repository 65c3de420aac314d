"""The script by which bash completes the words of `sorsa`, asked as bash asks it."""

import subprocess
from pathlib import Path

import pytest

from sorsa_ds.cli import completion
from sorsa_ds.cli.sorsa import COMMANDS


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The script for bash, as a file."""
    file = tmp_path_factory.mktemp("completion") / "sorsa"
    file.write_text(completion.script("bash"))
    return file


def completed(script: Path, *words: str) -> list[str]:
    """What the last of these words may become; bash has split them at signs of equality."""
    ask = 'source "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _sorsa; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask, "-", str(script), *words], text=True, capture_output=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("tr",), ["train"]),
        (("train", "train.ep"), ["train.epochs="]),
        (("train", "--ds"), ["--ds_config"]),
        (("train", "method", "=", "pi"), ["pissa"]),
        (("train", "--method", "=", "pi"), ["pissa"]),
        (("train", "loading.trust_remote_code", "="), ["true", "false"]),
        (("plan", "--node_b"), ["--node_bandwidth"]),
        (("export", "--form"), ["--format"]),
        (("train", "my-fi"), []),
    ],
)  # fmt: skip
def test_words_are_completed(script, words, wanted):
    assert completed(script, "sorsa", *words) == wanted


def test_every_command_that_has_options_is_known():
    assert {*COMMANDS} - {*completion.OPTIONS} == {"check", "completion"}
    for shell in completion.SHELLS:
        assert all(name in completion.script(shell) for name in COMMANDS)


def test_another_shell_is_refused(capsys):
    with pytest.raises(ValueError, match="name one of bash, zsh, fish"):
        completion._print(["tcsh"])
