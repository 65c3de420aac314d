"""A conversation with a model: what it may take, what happens beyond that, and what reaches the terminal."""

import io

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sorsa_ds.evaluate import chat
from sorsa_ds.evaluate.chat_options import ChatOptions
from tests.helpers.architectures import CONFIGS
from tests.helpers.projects import make

POSITIONS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with few positions, each an entry of a table, and one beyond it an error."""
    folder = make(tmp_path_factory.mktemp("few"), CONFIGS["gpt2"]) / "model"
    small = AutoConfig.from_pretrained(folder)
    small.n_positions, small.eos_token_id = POSITIONS, None
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    return folder


@pytest.fixture
def talk(model, monkeypatch):
    """talk(lines): puts these lines to the model, each answered with at most 200 tokens."""

    def put(*lines, tokens=200):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.chat(ChatOptions(model=str(model), prompt="plain", max_new_tokens=tokens, dtype="fp32"))

    return put


def test_an_answer_ends_where_the_model_has_no_more_positions(talk, capsys):
    talk("Hi")
    assert capsys.readouterr().out.strip()


def test_a_conversation_that_has_become_too_long_begins_anew_and_the_program_goes_on(talk, capsys, monkeypatch):
    asked = []
    answer = chat.Speaker.answer

    def noted(self, question, prompt):
        asked.append((question, len(self.history)))
        answer(self, question, prompt)

    monkeypatch.setattr(chat.Speaker, "answer", noted)
    long = "why " * POSITIONS
    talk("Hi", "And?", "Hi", long, long, "Hi")
    assert asked == [("Hi", 0), ("Hi", 0), ("Hi", 0)]
    told = capsys.readouterr().err
    assert f"the model takes {POSITIONS} with its answer; a new conversation begins here" in told
    assert "the question has" in told and "the conversation with this question has" in told


def test_what_the_model_writes_does_not_command_the_terminal(capsys):
    printed = chat._Printed(None)
    printed.on_finalized_text("\x1b]0;title\x07 red\x1b[31m\n")
    printed.on_finalized_text("end", stream_end=True)
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 red\\x1b[31m\nend\n"
