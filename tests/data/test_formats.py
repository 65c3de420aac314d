"""How rows become prompts and responses, and what of a conversation is learned."""

import json

import pytest

from sorsa_ds.data.formats import TOLD, prompt_for
from sorsa_ds.data.layout import resolve_format
from tests.helpers import small_data
from tests.helpers.chat_tokenizer import CHATML, chat_tokenizer
from tests.helpers.rendering import render

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello 🙂"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]

FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last else '...' }}")
"""Shows only the newest answer, as templates of reasoning models do with thoughts."""


def learned(rendered):
    """The learned pieces of text."""
    return [rendered.text[start:end] for start, end in rendered.learned]


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("metamath", "query", "response"),
        ("codefeedback", "query", "answer"),
        ("gsm8k", "question", "answer"),
        ("alpaca", "instruction", "output"),
    ],
)
def test_instruction_formats_share_the_papers_prompt(name, question, answer):
    rendered = render({question: "1+1?", answer: "Two.\nThe answer is: 2"}, name, None)
    assert rendered.text == PREAMBLE + "### Instruction:\n1+1?\n\n### Response: Two.\nThe answer is: 2"
    assert learned(rendered) == [" Two.\nThe answer is: 2"]
    assert rendered.closed
    assert rendered.text.startswith(prompt_for("1+1?"))
    assert prompt_for("1+1?").endswith("### Response:")


def test_alpaca_input_has_its_own_heading():
    rendered = render({"instruction": "Add.", "input": "1, 2", "output": "3"}, "alpaca", None)
    assert "paired with an input that provides further context" in rendered.text
    assert rendered.text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response: 3")
    for empty in ("", None):
        row = {"instruction": "Add.", "input": empty, "output": "3"}
        assert render(row, "alpaca", None).text == prompt_for("Add.") + " 3"


@pytest.mark.parametrize("origin", ["made", "real"])
def test_whole_alpaca_data(origin, request, tmp_path):
    folder = small_data.alpaca(tmp_path) if origin == "made" else request.getfixturevalue("shared_data") / "alpaca"
    rows = json.loads((folder / "alpaca_en_demo.json").read_text())
    with_input = sum("### Input:" in render(row, "alpaca", None).text for row in rows)
    assert with_input == sum(bool(row["input"] and row["output"]) for row in rows) > 0
    assert all(learned(render(row, "alpaca", None)) == [" " + row["output"]] for row in rows if row["output"])


def test_braces_and_leading_space_of_real_text_are_kept():
    rendered = render({"query": "what is {x}?", "answer": "\n```python\n{}\r\n```"}, "codefeedback", None)
    assert "what is {x}?" in rendered.text
    assert learned(rendered) == ["\n```python\n{}\r\n```"]


def test_text_is_learned_whole():
    rendered = render({"text": "once upon"}, "text", None)
    assert (rendered.text, learned(rendered), rendered.closed) == ("once upon", ["once upon"], True)


@pytest.mark.parametrize(("name", "row"), [("text", {"text": ""}), ("gsm8k", {"question": "q", "answer": " \n"})])
def test_a_row_without_response_teaches_nothing(name, row):
    rendered = render(row, name, None)
    assert rendered.learned == ()
    assert not rendered.closed
    assert "is blank" in rendered.left_out


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["type", "query", "original_question", "response"], "metamath"),
        (["query", "answer", "resource", "lang"], "codefeedback"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["instruction", "output"], "alpaca"),
        (["question", "answer", "gold"], "gsm8k"),
        (["prompt", "messages"], "chat"),
        (["text", "id"], "text"),
    ],
)
def test_auto_goes_by_the_columns(columns, name):
    assert resolve_format("auto", columns).format == name


def test_columns_beside_a_conversation_are_read_refused_or_told():
    found = resolve_format("chat", ["messages", "tools", "system_prompt", "conversations", "id", "images"])
    assert (found.refused, found.ignored) == (("system_prompt", "conversations"), ("id",))
    named = resolve_format("chat", ["messages", "conversations", "id"], {"messages": "conversations"})
    assert (named.refused, named.ignored) == ((), ("messages", "id"))


def test_unknown_columns_are_listed_with_the_formats():
    with pytest.raises(ValueError, match=r"'foo', 'bar' fit no known format .*metamath: query, response.*text: text"):
        resolve_format("auto", ["foo", "bar"])


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"metamath needs the column 'response'; there are 'query', 'answer'"):
        resolve_format("metamath", ["query", "answer"])


@pytest.mark.parametrize("value", [True, 1.5, {"a": 1}])
@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_column_that_holds_no_text_is_named(value, column):
    row = {"instruction": "q", "input": "", "output": "a"} | {column: value}
    with pytest.raises(ValueError, match=f"'{column}' holds .* where text is needed"):
        render(row, "alpaca", None)


def test_whole_numbers_stand_for_their_digits_and_null_is_no_example():
    assert learned(render({"question": "q", "answer": 72}, "gsm8k", None)) == [" 72"]
    assert "### Input:\n0\n" in render({"instruction": "q", "input": 0, "output": "a"}, "alpaca", None).text
    for column in ("question", "answer"):
        row = {"question": "q", "answer": "a"} | {column: None}
        assert render(row, "gsm8k", None).left_out == f"column '{column}' is null"


def test_every_assistant_turn_is_learned_to_its_end_token():
    rendered = render({"messages": TURNS}, "chat", chat_tokenizer())
    assert learned(rendered) == ["Hello 🙂<|im_end|>", "4<|im_end|>"]
    assert rendered.text.endswith("<|im_start|>assistant\n4<|im_end|>")
    assert not rendered.closed


def test_columnar_storage_may_add_empty_fields_to_messages():
    padded = [{**turn, "tool_calls": None} for turn in TURNS]
    strict = "{% if messages[0].tool_calls is defined %}{{ raise_exception('tools') }}{% endif %}" + CHATML
    assert render({"messages": padded}, "chat", chat_tokenizer(strict)).learned


def test_what_follows_the_last_assistant_turn_is_left_out():
    rendered = render({"messages": [*TURNS, {"role": "user", "content": "bye"}]}, "chat", chat_tokenizer())
    assert "bye" not in rendered.text


def test_a_template_without_end_of_turn_token_gets_one():
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rendered = render({"messages": TURNS[1:3]}, "chat", chat_tokenizer(plain))
    assert rendered.text == "user: Hi\nassistant: Hello 🙂"
    assert learned(rendered) == [" Hello 🙂"]
    assert rendered.closed


def test_a_conversation_without_assistant_teaches_nothing():
    assert render({"messages": TURNS[:2]}, "chat", chat_tokenizer()).learned == ()


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, TURNS, "needs a tokenizer with a chat template"),
        ("{{ messages | length }}" + CHATML, TURNS, "rewrites what came before message 3"),
        (FORGETFUL, TURNS, "rewrites message 3 when more messages follow.*data.learn: last"),
        ("{{ raise_exception('no system role') }}", TURNS, "refuses the conversation: no system role"),
        (CHATML, "hello", "'hello' where a list of messages is needed"),
        (CHATML, [{"who": "human", "value": "x"}], "message 1 is .* where a role and a content are needed"),
        (CHATML, TURNS[2:], "starts with the assistant"),
    ],
)
def test_chat_errors(template, messages, said):
    with pytest.raises(ValueError, match=said):
        render({"messages": messages}, "chat", chat_tokenizer(template))


@pytest.mark.parametrize(
    "stored", [json.dumps, lambda messages: messages, lambda messages: json.dumps(messages, indent=1)]
)
def test_prompt_and_completion_may_hold_messages_as_lists_or_as_json_text(stored):
    rendered = render({"prompt": stored(TURNS[:4]), "completion": stored(TURNS[4:])}, "completion", chat_tokenizer())
    assert learned(rendered) == ["4<|im_end|>"]
    assert [remark.partition(" by ")[0] for remark in rendered.remarks] == [TOLD.format("").strip()]
    mixed = render({"prompt": stored(TURNS[:4]), "completion": "[4]"}, "completion", chat_tokenizer())
    assert learned(mixed) == ["[4]<|im_end|>"]


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[]", "[INST] x", '[{"role": "manager", "name": "Bob"}]', '[{"role": "user"}]']
)
def test_other_json_text_is_text(text):
    rendered = render({"prompt": "Q: ", "completion": text}, "completion", chat_tokenizer())
    assert learned(rendered) == [text]


def test_messages_as_json_text_that_would_be_changed_are_refused():
    text = '[{"role": "user", "content": "Hi", "content": "Ho"}]'
    with pytest.raises(ValueError, match="column 'prompt' holds .*is set twice"):
        render({"prompt": text, "completion": "Hello"}, "completion", chat_tokenizer())


def test_history_and_stored_tokens_may_be_json_text():
    row = {"instruction": "2+2?", "output": "4"}
    for history in ([["Hi", "Hello"]], []):
        listed, text = ({**row, "history": stored} for stored in (history, json.dumps(history)))
        assert render(text, "alpaca", chat_tokenizer()) == render(listed, "alpaca", chat_tokenizer())
    with pytest.raises(ValueError, match="column 'history' holds .* where pairs"):
        render({**row, "history": "[["}, "alpaca", chat_tokenizer())
    assert render({"input_ids": "[5, 6]", "labels": "[-100, 6]"}, "tokens", chat_tokenizer()).tokens == (
        [5, 6],
        [-100, 6],
    )


def test_alpacas_columns_can_be_turns_in_the_chat_template():
    row = {
        "instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Hello"]],
    }  # fmt: skip
    tokenizer = chat_tokenizer(CHATML)
    rendered = render(row, "alpaca_chat", tokenizer)
    said = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Add.\n1, 2"},
        {"role": "assistant", "content": "3"},
    ]  # fmt: skip
    assert rendered == render({"messages": said}, "chat", tokenizer)
    assert [text.strip() for text in learned(rendered)] == ["Hello<|im_end|>", "3<|im_end|>"]
    short = {"instruction": "Add.", "input": "", "output": "3", "system": None, "history": None}
    said = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
    assert render(short, "alpaca_chat", tokenizer) == render({"messages": said}, "chat", tokenizer)
    assert "is blank" in render({**short, "output": " "}, "alpaca_chat", tokenizer).left_out
    with pytest.raises(ValueError, match="'tools'.*does not read it"):
        render({**short, "tools": "[1]"}, "alpaca_chat", tokenizer)
    with pytest.raises(ValueError, match="data.prompt goes with a prompt and a response; data.format=alpaca_chat"):
        resolve_format("alpaca_chat", [*short], prompt="{{ instruction }}")
