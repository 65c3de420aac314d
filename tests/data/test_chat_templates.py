"""Every chat template that TRL carries: conversations are learned exactly, or refused for the reason that is true."""

import pickle
import re

import pytest

from benchmarks.helpers.chat_templates import count_exact, fault_of
from sorsa_ds.data.chat import DATED, KEPT, OPENED, describe_template, render_chat, render_prompt
from sorsa_ds.data.chat_templates import marked_template, trl_templates, use_template
from sorsa_ds.data.formats import Rendered
from sorsa_ds.data.tokenize import IGNORED, encode
from sorsa_ds.evaluate.prompts import prompt_tokens
from tests.helpers.chat_families import CONVERSATIONS, LEARNED, REFUSED, assistant, family_tokenizer, user
from tests.helpers.chat_tokenizer import CHATML, chat_tokenizer

TWO = [user("Hi"), assistant("Hello", reasoning_content="Greet."), user("2+3?"), assistant("five")]
EVERY = sorted(trl_templates())
BY_HAND = [name for name in EVERY if name in LEARNED]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_learned_turns_are_those_written_by_hand(name, conversation):
    assert not fault_of(name, conversation)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in LEARNED])
def test_every_template_learns_exactly_or_says_why_not(name):
    for conversation in CONVERSATIONS:
        assert not fault_of(name, conversation), conversation


@pytest.mark.slow
def test_the_benchmark_counts_all_of_them_as_exact():
    templates, exact = count_exact()
    assert templates == exact == len(EVERY) > 30


def test_expectations_name_templates_that_are_there():
    assert set(LEARNED) | {name for reasons in REFUSED.values() for name in reasons} <= set(EVERY)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML, "by where each turn begins and ends"),
        ("{% generation %}x{% endgeneration %}", "by the {% generation %} markers of the model's own template"),
        (trl_templates()["qwen3"] + "\n", "by TRL's training template for qwen3"),
    ],
)
def test_the_way_that_is_taken_is_told(template, told):
    assert describe_template(chat_tokenizer(template)).startswith(told)


def test_the_last_turn_alone_is_learned_as_the_model_is_served():
    tokenizer = family_tokenizer(trl_templates()["qwen3"])
    both, last = (render_chat({"messages": TWO}, tokenizer, learn) for learn in ("all", "last"))
    assert KEPT in both.remarks
    assert "Greet." in both.text
    assert last.remarks == ("the template drops the reasoning of a turn that is not learned",)
    assert last.text == tokenizer.apply_chat_template(TWO, tokenize=False).rstrip()
    assert [last.text[start:end] for start, end in last.learned] == ["<think>\n\n</think>\n\nfive<|im_end|>"]


@pytest.mark.parametrize("name", ["gptoss", "glm4moe", "gemma4_v5", "lfm2_2_5"])
def test_thoughts_of_earlier_turns_that_a_template_drops_are_not_lost_silently(name):
    with pytest.raises(ValueError, match=r"rewrites message 2 when more messages follow.*data\.learn: last"):
        render_chat({"messages": TWO}, family_tokenizer(trl_templates()[name]))


def test_a_twin_that_writes_another_text_is_not_used():
    """DeepSeek-V3's own template takes arguments as text, of which its twin makes text once more."""
    messages = CONVERSATIONS["tools"]["messages"]
    rendered = render_chat({"messages": messages}, family_tokenizer(trl_templates()["deepseekv3"]))
    first, last = (rendered.text[start:end] for start, end in rendered.learned)
    assert '\n```json\n{"a": 2, "b": 3}\n```' in first
    assert last == "five<｜end▁of▁sentence｜>"


def test_thoughts_in_the_content_are_learned_where_only_the_twin_keeps_them():
    content = "<think>\nGreet.\n</think>\n\nHello"
    tokenizer = family_tokenizer(trl_templates()["deepseek_r1_distill"])
    rendered = render_chat({"messages": [user("Hi"), assistant(content)]}, tokenizer)
    assert [rendered.text[start:end] for start, end in rendered.learned] == [
        "Greet.\n</think>\n\nHello<｜end▁of▁sentence｜>"
    ]
    assert rendered.remarks == (KEPT,)


def test_a_prompt_that_opens_a_thought_without_one_in_the_answer_is_said():
    rendered = render_chat(CONVERSATIONS["single"], family_tokenizer(trl_templates()["deepseekv3"]))
    assert rendered.remarks == (OPENED,)


@pytest.mark.parametrize("markers", ["{m.content}<|im_end|>", "{m.content}"])
def test_an_end_token_behind_its_mark_is_learned_too(markers):
    inner, outer = ("{{ m.content }}<|im_end|>", "") if "end" in markers else ("{{ m.content }}", "<|im_end|>")
    marked = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        f"{{% if m.role == 'assistant' %}}{{% generation %}}{inner}{{% endgeneration %}}{outer}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    rendered = render_chat(CONVERSATIONS["turns"], chat_tokenizer(marked))
    assert [rendered.text[start:end] for start, end in rendered.learned] == ["Hello<|im_end|>", "five<|im_end|>"]


def test_wrong_marks_give_way_to_where_the_turns_are():
    marked = CHATML.replace(
        "<|im_start|>{{ m.role }}", "{% generation %}<|im_start|>{% endgeneration %}{{ m.role }}", 1
    )
    assert marked_template(marked) is not None
    rendered = render_chat(CONVERSATIONS["turns"], chat_tokenizer(marked))
    assert [rendered.text[start:end] for start, end in rendered.learned] == ["Hello<|im_end|>", "five<|im_end|>"]


def test_a_template_gets_no_special_tokens_besides_its_own():
    tokenizer = family_tokenizer(CHATML)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    row = CONVERSATIONS["turns"]
    ids = encode(Rendered(**render_chat(row, tokenizer)._asdict()), tokenizer, 1000)["input_ids"].tolist()
    served = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert ids == served[: len(ids)]
    assert not tokenizer.decode(served[len(ids) :]).strip()


def test_a_template_is_a_file_or_a_name(tmp_path):
    tokenizer, file = chat_tokenizer(None), tmp_path / "mine.jinja"
    file.write_text(CHATML)
    use_template(tokenizer, str(file))
    assert tokenizer.chat_template == CHATML
    use_template(tokenizer, "llama3")
    assert tokenizer.chat_template == trl_templates()["llama3"]
    tokenizer.chat_template = {"default": "d", "rag": "r"}
    use_template(tokenizer, "rag")
    assert tokenizer.chat_template == "r"


def test_a_template_that_is_nowhere_is_refused(tmp_path):
    empty = tmp_path / "empty.jinja"
    empty.touch()
    unknown = r"'lama3' is neither a file nor one of the names .*llama3"
    for request, said in ((str(empty), "is empty"), ("lama3", unknown)):
        with pytest.raises(ValueError, match=rf"^data\.chat_template: .*{said}"):
            use_template(chat_tokenizer(), request)


def test_evaluation_sees_the_tokens_that_training_made_of_a_template():
    tokenizer = family_tokenizer(CHATML)
    messages = CONVERSATIONS["single"]["messages"]
    example = encode(Rendered(**render_chat({"messages": messages}, tokenizer)._asdict()), tokenizer, 1000)
    asked = prompt_tokens(render_prompt(messages[:1], tokenizer), tokenizer, bare=True)
    assert example["input_ids"][: len(asked)].tolist() == asked
    assert (example["labels"][: len(asked)] == IGNORED).all()
    assert example["labels"][len(asked)] != IGNORED


def test_errors_of_a_template_that_was_asked_for_name_the_request(tmp_path):
    file = tmp_path / "my.jinja"
    file.write_text("{{ 1 / 0 }}")
    tokenizer = chat_tokenizer()
    use_template(tokenizer, str(file))
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        with pytest.raises(ValueError, match=rf"^data\.chat_template \({re.escape(str(file))}\) fails, in its line 1"):
            render_chat({"messages": [user("Hi"), assistant("Hello")]}, one)


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    (tmp_path / "my.jinja").write_text(CHATML, encoding="utf-8-sig")
    tokenizer = chat_tokenizer(None)
    use_template(tokenizer, str(tmp_path / "my.jinja"))
    assert tokenizer.chat_template == CHATML


def test_a_template_that_asks_for_the_date_is_said():
    row = {"messages": [user("Hi"), assistant("Hello")]}
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert render_chat(row, chat_tokenizer(dated)).remarks == (DATED,)
    assert render_chat(row, chat_tokenizer()).remarks == ()
