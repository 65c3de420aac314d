"""From stored conversations to messages: every shape is taken as it is written, left out with a reason, or refused."""

import json
import time

import pytest
from datasets import Dataset

from sorsa_ds.data.chat import ENDLESS, NAMELESS, render_chat
from sorsa_ds.data.conversations import EMPTY_TURN, UNANSWERED, conversation_of
from sorsa_ds.data.formats import Rendered
from sorsa_ds.data.tokenize import IGNORED, encode
from sorsa_ds.data.tools import NULLS, ROUNDED
from sorsa_ds.data.turns import missing_parts
from tests.helpers.chat_families import CALL, TOOLS, assistant, user
from tests.helpers.chat_tokenizer import CHATML, chat_tokenizer

HI = [user("Hi"), assistant("Hello")]
FOUR = [*HI, user("2+3?"), assistant("five")]
ARGUMENTS = {"a": 2, "b": 3}
UNRULED = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
CUTTING = CHATML.replace("{{ m.content }}", "{{ m.content[:5] }}")
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def learned(row, learn="all", template=CHATML):
    """The learned pieces of a row's text."""
    rendered = render_chat(row, chat_tokenizer(template), learn)
    return [rendered.text[start:end].removesuffix("<|im_end|>") for start, end in rendered.learned]


def calls_of(row):
    """The calls of a row's messages."""
    return [message["tool_calls"] for message in conversation_of(row).messages if "tool_calls" in message]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI},
        {"messages": json.dumps(HI)},
        {"messages": [{**message, "tool_calls": None, "name": None} for message in HI]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}], "system": None},
        {"conversations": HI},
        {"prompt": [HI[0]], "completion": [HI[1]]},
        {"prompt": [HI[0]], "completion": "Hello"},
        {"prompt": "Hi", "completion": [HI[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H", "url": None}, "i"]}, HI[1]]},
    ],
)
def test_all_shapes_become_the_same_messages(row):
    assert list(conversation_of(row).messages) == HI
    assert learned(row) == ["Hello"]


def test_a_system_column_comes_first():
    spoken = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    row = {"conversations": spoken, "system": "Be brief."}
    assert conversation_of(row).messages[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ValueError, match="column 'system' stands beside a conversation that has a system message"):
        conversation_of({"messages": [{"role": "system", "content": "s"}, *HI], "system": "Be brief."})


def test_only_the_completion_is_learned():
    assert learned({"prompt": FOUR[:3], "completion": FOUR[3:]}) == ["five"]
    assert learned({"prompt": FOUR[:1], "completion": FOUR[1:]}) == ["Hello", "five"]


@pytest.mark.parametrize("leave_out", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_a_turn_may_be_left_out(leave_out):
    first, second = [FOUR[0], {**FOUR[1], **leave_out}, *FOUR[2:]], [*FOUR[:3], {**FOUR[3], **leave_out}]
    assert learned({"messages": first}) == ["five"]
    assert learned({"messages": second}) == ["Hello"]
    whole = render_chat({"messages": second}, chat_tokenizer())
    assert whole.text.endswith("five<|im_end|>"), "the turn is not learned; it stays in the text"
    assert conversation_of({"messages": [HI[0], {**HI[1], **leave_out}]}).left_out.startswith("no turn to learn")


def test_the_last_turn_alone_can_be_learned():
    assert learned({"messages": FOUR}, "last") == ["five"]
    assert conversation_of({"messages": [*FOUR[:3], {**FOUR[3], "train": False}]}, "last").left_out


def test_a_last_turn_that_is_not_learned_gets_no_end_token():
    rendered = render_chat({"messages": [*FOUR[:3], {**FOUR[3], "weight": 0}]}, chat_tokenizer(PLAIN))
    assert not rendered.closed
    assert render_chat({"messages": FOUR}, chat_tokenizer(PLAIN)).remarks == (ENDLESS,)


@pytest.mark.parametrize("empty", [None, "", " \n"])
def test_empty_turns_are_not_learned_and_counted(empty):
    tokenizer = chat_tokenizer()
    rendered = render_chat({"messages": [user("Hi"), assistant(empty), *FOUR[2:]]}, tokenizer)
    assert [rendered.text[start:end] for start, end in rendered.learned] == ["five<|im_end|>"]
    assert rendered.remarks == (EMPTY_TURN,)
    trailing = render_chat({"messages": [*HI, user("2+3?"), assistant(empty)]}, tokenizer)
    assert trailing.text.endswith("Hello<|im_end|>")
    assert trailing.remarks == (EMPTY_TURN, UNANSWERED)
    assert conversation_of({"messages": [user("Hi"), assistant(empty)]}).left_out == "an empty response"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "no message"),
        ({"messages": []}, "no message"),
        ({"messages": [user("Hi")]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": None}, assistant("Hello")]}, "a user message is null"),
    ],
)
def test_rows_that_are_no_example_say_why(row, reason):
    rendered = render_chat(row, chat_tokenizer())
    assert (rendered.left_out, rendered.learned, rendered.closed) == (reason, (), False)


def test_what_follows_the_last_answer_is_said():
    assert render_chat({"messages": [*HI, user("bye")]}, chat_tokenizer()).remarks == (UNANSWERED,)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "add", "arguments": ARGUMENTS},
        {"function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}},
        {"type": "function", "function": {"name": "add", "arguments": {**ARGUMENTS, "c": None}}},
    ],
)
def test_calls_take_one_form(call):
    row = {"messages": [user("2+3?"), assistant(None, tool_calls=[call])]}
    assert calls_of(row) == [[CALL]]
    assert conversation_of(row).learned == (1,)


def test_calls_of_other_shapes():
    value = json.dumps({"name": "add", "arguments": ARGUMENTS})
    spoken = [{"from": "human", "value": "2+3?"}, {"from": "function_call", "value": value}]
    assert calls_of({"conversations": spoken}) == [[CALL]]
    early = {"role": "assistant", "function_call": json.loads(value), "content": None}
    assert calls_of({"messages": [user("2+3?"), early]}) == [[CALL]]


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS)},
        {"tools": [json.dumps(tool) for tool in TOOLS]},
        {"functions": [tool["function"] for tool in TOOLS], "tools": None},
    ],
)
def test_tools_take_one_form(columns):
    assert conversation_of({"messages": HI, **columns}).tools == TOOLS


def test_fields_that_storage_has_added_to_tools_are_left_out():
    parameters = {"properties": {"zone": {"type": "string"}}}
    other = {"type": "function", "function": {"name": "now", "parameters": parameters}}
    stored = Dataset.from_list([{"messages": HI, "tools": [*TOOLS, other]}])[0]
    assert conversation_of(stored).tools == [*TOOLS, other]


def test_reasoning_has_many_names():
    for fields in ({"reasoning_content": "Why."}, {"thinking": "Why."}, {"reasoning": "Why."}):
        assert conversation_of({"messages": [HI[0], {**HI[1], **fields}]}).messages[1]["reasoning_content"] == "Why."
    parts = [{"type": "thinking", "thinking": "Why."}, {"type": "text", "text": "Hello"}]
    told = conversation_of({"messages": [HI[0], assistant(parts)]}).messages[1]
    assert told == assistant("Hello", reasoning_content="Why.")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user([{"type": "image_url", "url": "x"}]), HI[1]]}, "message 1 has the part .* only text can"),
        ({"messages": [user("Hi"), assistant({"answer": 5})]}, r"message 2 holds \{'answer': 5\} where text is needed"),
        ({"messages": [user("Hi"), assistant(5)]}, "message 2 holds 5 where text is needed"),
        ({"messages": [{**HI[0], "images": ["a.png"]}, HI[1]]}, "message 1 has images"),
        ({"messages": HI, "images": ["a.png"]}, "column 'images' holds .* only text is learned"),
        ({"messages": ["Hi", "Hello"]}, "message 1 is 'Hi' where a role and a content are needed"),
        ({"messages": "[broken"}, "where a list of messages is needed"),
        ({"messages": {"role": "user"}}, "where a list of messages is needed"),
        ({"messages": [{**HI[0], "train": True}, HI[1]]}, "message 1 has train: true; only turns of the assistant"),
        ({"messages": [HI[0], {**HI[1], "train": "no"}]}, "message 2 has train: 'no'; it is true or false"),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, r"message 2 has weight: 0\.5"),
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, "message 1 is from 'alien'; known are system, .*gpt"),
        ({"messages": [HI[0], assistant("x", reasoning_content=["y"])]}, r"message 2 holds \['y'\] as reasoning"),
        ({"messages": HI, "system": 5}, "column 'system' holds 5 where text is needed"),
        ({"messages": HI, "tools": TOOLS, "functions": TOOLS}, "both columns 'tools' and 'functions'"),
        ({"messages": HI, "tools": "{"}, "column 'tools' holds '{', which is no JSON"),
        ({"messages": HI, "tools": ["add"]}, "column 'tools' holds the tool 'add', which is no JSON"),
        ({"messages": HI, "tools": [{"description": "x"}]}, "which has no name"),
        ({"messages": [HI[0], assistant(None, tool_calls="add")]}, "message 2 holds the call 'add', which is no JSON"),
        ({"messages": [HI[0], assistant(None, tool_calls=[5])]}, "message 2 holds 5 where a call"),
        ({"messages": [HI[0], assistant(None, tool_calls=[{"name": "add", "arguments": "2"}])]}, "calls add with '2'"),
        ({"prompt": "Hi", "completion": 5}, "column 'completion' holds 5"),
        ({"messages": HI[1:]}, "starts with the assistant"),
    ],
)
def test_what_cannot_be_passed_on_is_refused(row, said):
    with pytest.raises(ValueError, match=said):
        conversation_of(row)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CHATML, [{"role": "humam", "content": "Hi"}, HI[1]], "message 1 has the role 'humam'"),
        (UNRULED, [{"role": "system", "content": "Be kind."}, *HI], r"leaves out the content of message 1 \(system\)"),
        (CHATML, [user("2+3?"), assistant("x", tool_calls=[CALL])], "leaves out the tool call of message 2"),
        (CHATML, [HI[0], assistant("Hello", thinking="Why.")], "leaves out the reasoning of message 2"),
        (CUTTING, [HI[0], assistant("Hello there")], "leaves out the content of message 2"),
    ],
)
def test_what_a_template_leaves_out_is_refused(template, messages, said):
    with pytest.raises(ValueError, match=said):
        render_chat({"messages": messages}, chat_tokenizer(template))


def test_a_role_of_the_templates_own_is_taken():
    template = CHATML.replace("{{ m.role }}", "{{ 'oracle' if m.role == 'oracle' else m.role }}")
    assert learned({"messages": [{"role": "oracle", "content": "Soon."}, *HI]}, template=template) == ["Hello"]


def test_exactly_the_tokens_of_the_turns_are_learned():
    tokenizer = chat_tokenizer()
    row = {"messages": [HI[0], {**HI[1], "train": False}, *FOUR[2:]]}
    example = encode(Rendered(**render_chat(row, tokenizer)._asdict()), tokenizer, 1000)
    assert tokenizer.decode(example["input_ids"][example["labels"] != IGNORED]) == "five<|im_end|>"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"a": 12345678901234567890.123}', r"12345678901234567890\.123 would be written as 1\.2345678901234567e"),
        ('{"a": 1e400}', "number 1e400 would be written as inf"),
        ('{"a": [1.50]}', r"number 1\.50 would be written as 1\.5; write it so"),
        ('{"a": -0}', "number -0 would be written as 0"),
        ('{"a": 0.1, "a": 0.2}', '"a" is set twice'),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ("[" * 200000, "more than 64 lists and objects are inside one another"),
    ],
)
def test_json_text_that_would_be_changed_is_refused_with_the_reason(arguments, said):
    called = assistant(None, tool_calls=[{"name": "add", "arguments": arguments}])
    with pytest.raises(ValueError, match=rf"message 2 calls add with .*{said}"):
        conversation_of({"messages": [user("Hi"), called]})
    with pytest.raises(ValueError, match=f"column 'tools' holds .*{said}"):
        conversation_of({"messages": HI, "tools": arguments})
    text = arguments if arguments.startswith("[") else f"[{arguments}]"
    with pytest.raises(ValueError, match=f"column 'messages' holds .*{said}"):
        conversation_of({"messages": text})


def test_numbers_and_nulls_of_json_text_stay():
    arguments = {"a": 0.1, "b": None, "c": 10**30, "d": -2}
    called = assistant(None, tool_calls=[{"name": "add", "arguments": json.dumps(arguments)}])
    found = conversation_of({"messages": [user("Hi"), called], "tools": "null"})
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert (found.tools, found.remarks) == (None, ())


def test_nulls_that_are_left_out_are_said():
    called = assistant(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": [{"b": None}]}}}])
    assert conversation_of({"messages": [user("Hi"), called]}).remarks == (NULLS,)
    tools = [{"name": "add", "description": None, "parameters": {"a": {"default": None}}}]
    assert conversation_of({"messages": HI, "tools": tools}).remarks == (NULLS,)
    assert conversation_of({"messages": HI, "tools": [{**tools[0], "parameters": {}}]}).remarks == ()


def test_numbers_that_may_have_been_rounded_are_said():
    for number, remarks in ((12345678901234567890.123, (ROUNDED,)), (-0.1234567890123456, (ROUNDED,)), (0.1, ())):
        called = assistant(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": [number, 10**30]}}}])
        assert conversation_of({"messages": [user("Hi"), called]}).remarks == remarks


def test_calls_under_two_names_are_refused():
    called = assistant(None, tool_calls=[CALL], function_call={"name": "sub", "arguments": "{}"})
    with pytest.raises(ValueError, match="message 2 has both tool_calls and function_call"):
        conversation_of({"messages": [user("Hi"), called]})


def test_a_part_is_not_shown_by_another_that_says_the_same():
    weather = {"name": "get_weather", "arguments": {"city": "Rome"}}
    called = assistant("I will call get_weather for the city Rome.", tool_calls=[weather])
    with pytest.raises(ValueError, match="leaves out the tool call of message 2"):
        learned({"messages": [user("Weather?"), called]})
    with pytest.raises(ValueError, match="leaves out the tool call of message 2"):
        learned({"messages": [user("get_weather city Rome"), {**called, "train": False}, *HI]})
    with pytest.raises(ValueError, match="leaves out the reasoning of message 2"):
        learned({"messages": [user("2+2?"), assistant("2+2 is 4", reasoning_content="2+2 is 4")]})
    system = {"role": "system", "content": "Translate to French"}
    with pytest.raises(ValueError, match=r"leaves out the content of message 1 \(system\)"):
        learned({"messages": [system, user("Translate to French: dog"), HI[1]]}, template=UNRULED)
    assert learned({"messages": [user("Hi"), assistant("Hi"), user("Hi"), assistant("Hi\n\nHi")]}) == ["Hi", "Hi\n\nHi"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{**HI[0], "tool_calls": [CALL]}, HI[1]], r"message 1 \(user\) has calls of tools"),
        ([{**HI[0], "reasoning": "Hm"}, HI[1]], r"message 1 \(user\) has reasoning"),
        (
            [HI[0], {**HI[1], "reasoning_content": "deep", "thinking": "other"}],
            "two different texts .*'deep' and 'other'",
        ),
        ([HI[0], assistant(None, refusal="I cannot do that")], "message 2 has a refusal"),
        ([{"from": "human", "value": "Hi", "content": "Ho"}, HI[1]], "both a value and a content"),
    ],
)
def test_what_stands_in_another_field_is_not_lost(messages, said):
    with pytest.raises(ValueError, match=said):
        conversation_of({"messages": messages})


def test_content_and_reasoning_may_have_two_names_or_the_other_one():
    assert list(conversation_of({"messages": [{"from": "human", "content": "Hi"}, HI[1]]}).messages) == HI
    twice = {**HI[1], "reasoning_content": "Why.", "thinking": "Why.", "reasoning": ""}
    assert conversation_of({"messages": [HI[0], twice]}).messages[1]["reasoning_content"] == "Why."


def test_a_name_that_the_template_does_not_show_is_said():
    messages = [{**HI[0], "name": "alice"}, HI[1]]
    assert render_chat({"messages": messages}, chat_tokenizer()).remarks == (NAMELESS,)
    naming = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ ' ' ~ m.name if m.name }}")
    assert render_chat({"messages": messages}, chat_tokenizer(naming)).remarks == ()


@pytest.mark.parametrize("role", ["Assistant", "model", "bot"])
def test_an_unknown_role_that_answers_is_named(role):
    with pytest.raises(ValueError, match=f"message 2 has the role '{role}', which no template knows"):
        learned({"messages": [HI[0], {"role": role, "content": "Hello"}]})
    knowing = CHATML + "{{ '' if '" + role + "' }}"
    with pytest.raises(ValueError, match=f"message 2 has the role '{role}', and none is the assistant's"):
        learned({"messages": [HI[0], {"role": role, "content": "Hello"}]}, template=knowing)


def test_a_long_text_of_many_lines_is_found_quickly():
    text = "\n".join(f"line {number} of a long text" for number in range(50_000))
    began = time.monotonic()
    assert missing_parts([user(text), user("line 7 of a long text")], f"<u>{text}</u>") == [set(), {"content"}]
    assert missing_parts([user("a\n\n b"), user("c\nd")], "a\nb\nc") == [set(), {"content"}]
    assert time.monotonic() - began < 5
