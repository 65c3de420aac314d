"""A value of any kind in any field of any format is learned, left out or refused in words, and never a traceback."""

from datetime import datetime

import pytest

from sorsa_ds.data.chat_templates import use_template
from sorsa_ds.data.conversations import conversation_of
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.rendering import render

DEEP = "[" * 100_000
VALUES = [
    None, True, False, 5, 1.5, -1, 10**30, float("nan"), "", "x", "5", "[", "[]", "{}", DEEP, b"x",
    datetime(2024, 1, 1), [], [None], ["x"], [5], [10**30], [[]], [{}], [["a"]], [["a", None]], [["a", 5]], {},
    {"a": 1}, {"a": None}, {"type": ["x"]}, [{"type": ["x"], "text": []}], [{"from": ["x"]}],
    [{"role": ["x"], "content": "y"}], [{"name": ["x"]}], [{"function": 5}], [{"name": "f", "arguments": DEEP}],
]  # fmt: skip
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
BESIDE = ("system", "tools", "functions", "images", "documents", "chat_template_kwargs", "context", "conversations")
ROWS = {
    "chat": {"messages": CHAT, **dict.fromkeys(BESIDE)},
    "completion": {"prompt": "p", "completion": "c", "system": None, "tools": None},
    "tokens": {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
    "alpaca": {"instruction": "i", "input": "", "output": "o", "system": None, "history": None},
    "gsm8k": {"question": "q", "answer": "a", "context": None},
    "text": {"text": "t", "image": None},
}
FIELDS = (
    "role", "content", "from", "value", "tool_calls", "function_call", "train", "weight", "reasoning", "thinking",
    "images", "name", "tool_call_id",
)  # fmt: skip


def refused(action):
    """Whether it was refused in words; any other error goes on."""
    try:
        action()
    except ValueError as error:
        return bool(str(error))
    return False


@pytest.mark.parametrize(("name", "column"), [(name, column) for name, row in ROWS.items() for column in row])
def test_any_value_in_any_column(name, column):
    tokenizer = chat_tokenizer()
    found = [refused(lambda v=value: render(ROWS[name] | {column: v}, name, tokenizer)) for value in VALUES]
    assert any(found)


@pytest.mark.parametrize("given", [CHAT, SHAREGPT], ids=["messages", "conversations"])
@pytest.mark.parametrize("field", FIELDS)
def test_any_value_in_any_field_of_a_message(given, field):
    for place in (0, 1):
        for value in VALUES:
            messages = [message | {field: value} if at == place else message for at, message in enumerate(given)]
            refused(lambda m=messages: conversation_of({"messages": m}))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": 5, "labels": [5]}, "'input_ids' holds 5 where a list of whole numbers"),
        ({"input_ids": True, "labels": [5]}, "'input_ids' holds True where a list of whole numbers"),
        ({"input_ids": [5], "labels": 5}, "'labels' holds 5 where a list of whole numbers"),
        ({"messages": [{"from": ["x"], "value": "y"}]}, r"message 1 is from \['x'\]"),
        ({"messages": DEEP}, "where a list of messages is needed"),
        ({"messages": CHAT, "tools": DEEP}, "'tools' holds .*, which is no JSON"),
        ({"messages": CHAT, "tools": [{"name": "f", "since": datetime(2024, 1, 1)}]}, "which is no JSON"),
        ({"instruction": "i", "output": "o", "history": False}, "'history' holds False"),
    ],
)
def test_the_refusal_names_the_field(row, said):
    name = "tokens" if "input_ids" in row else "chat" if "messages" in row else "alpaca"
    with pytest.raises(ValueError, match=said):
        render(row, name, chat_tokenizer())


def test_fields_that_storage_has_added_do_not_hide_who_speaks():
    row = {"conversations": [SHAREGPT[0], SHAREGPT[1] | {"role": None, "train": True}]}
    assert conversation_of(row).learned == (1,)


@pytest.mark.parametrize(
    "request_", ["{{ messages }}" * 1000, "~nobody-of-that-name/x", "a\0b", "{% for m in messages %}\n"]
)
def test_a_template_in_place_of_its_name_is_refused(request_):
    with pytest.raises(ValueError, match=r"data\.chat_template: .* is neither a file nor one of the names"):
        use_template(chat_tokenizer(), request_)
