"""Chat templates are programs by others: what they may not do, and that they render as the tokenizer would."""

import datetime
import time

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from sorsa_ds.data import chat_process, template_process
from sorsa_ds.data.chat import render_chat, render_prompt
from sorsa_ds.data.layout import resolve_format
from sorsa_ds.data.tokenize import encode_all
from sorsa_ds.runtime.line_process import LineProcess
from tests.helpers.chat_tokenizer import CHATML, chat_tokenizer

MESSAGES = [{"role": "user", "content": "Hi\ud800 🙂"}, {"role": "assistant", "content": "Hello <|im_end|>"}]
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def rendered_here(template):
    """What the child process would answer, without a child process."""
    question = {"template": template, "tokens": {}, "messages": MESSAGES, "tools": None, "marked": False}
    return chat_process.render({**question, "beginnings": [[2, False]]})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("\n\n{{ 1 / 0 }}", "fails, in its line 3: ZeroDivisionError: division by zero"),
        ("{{ 'a' + 1 }}", "fails, in its line 1: TypeError: "),
        ("{{ messages[7].content }}", "fails, in its line 1: UndefinedError: "),
        ("{% for i in range(10**9) %}x{% endfor %}", "fails, in its line 1: OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}\n{{ m() }}", "fails, in its line 1: RecursionError: "),
        ("{{ messages.__class__.__mro__ }}", "fails, in its line 1: SecurityError: "),
        ("\n{% if %}", "fails, in its line 2: TemplateSyntaxError: "),
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ raise_exception('a' * 9999) }}", "refuses the conversation: " + "a" * 1000),
        ("{{ 'ab' * 2**23 }}{{ 'c' }}", "makes a text of 16777217 characters; at most 16777216 are allowed"),
    ],
)
def test_every_error_of_a_template_is_one_sentence(template, said):
    fault = rendered_here(template)["fault"]
    assert fault.startswith(said)
    assert len(fault) < 1100


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param(ENDLESS, "does not come to an end: it was stopped after", marks=pytest.mark.slow),
        pytest.param(
            "{{ 9 ** (9 ** (9 ** 9)) }}",
            "does not come to an end|too much memory|want of memory",
            marks=pytest.mark.slow,
        ),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        ("{{ 'a' | center(10**10) }}", "too much memory"),
        (DOUBLING, "too much memory"),
    ],
)
def test_a_template_without_end_is_stopped_and_the_next_one_rendered(template, said, monkeypatch):
    brief = LineProcess(chat_process.__name__, seconds=2.0, memory=2**28)
    monkeypatch.setattr(template_process, "_process", brief)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template of the tokenizer .*({said})"):
        render_chat({"messages": MESSAGES}, chat_tokenizer(template))
    assert render_chat({"messages": MESSAGES}, chat_tokenizer()).learned
    assert time.monotonic() - began < 60
    brief.end()


def test_the_message_names_the_data_the_row_and_the_tokenizer():
    tokenizer = chat_tokenizer("{% if messages | length == 4 %}{{ 1 / 0 }}{% endif %}" + CHATML)
    tokenizer.name_or_path = "models/foreign"
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = Dataset.from_list([{"messages": [question, answer]}, {"messages": [question] * 3 + [answer]}])
    said = r"^my\.jsonl, row 2: the chat template of models/foreign fails, in its line 1: ZeroDivisionError"
    with pytest.raises(ValueError, match=said):
        encode_all(rows, resolve_format("chat", rows.column_names), tokenizer, 100, "my.jsonl")


@pytest.mark.parametrize(
    "template", [pytest.param(CHATML, id="made"), pytest.param(None, id="embedded", marks=pytest.mark.slow)]
)
def test_texts_are_those_of_the_tokenizer(template, request):
    tokenizer = chat_tokenizer(template)
    if template is None:
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("embedded_model"))
    messages = [{**message, "tool_calls": None} for message in MESSAGES]
    text, learned, *_ = render_chat({"messages": messages}, tokenizer)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert learned == ((len(prompt), len(text)),)
    assert render_prompt(messages[:1], tokenizer) == prompt


def test_values_that_are_no_text_are_shown_as_the_tokenizer_shows_them():
    messages = [{"role": "user", "content": "Hi", "at": datetime.datetime(2026, 1, 1), "n": [1, None, {"a": 2.5}]}]
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.at }} {{ m.n | tojson }}{% endfor %}")
    assert render_prompt(messages, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
