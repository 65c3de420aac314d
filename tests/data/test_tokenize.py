"""Which tokens are learned: by their place in the text, with real tokenizers."""

import json
from collections import Counter

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizer

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import chat, chat_templates
from sorsa_ds.data import tokenize as module
from sorsa_ds.data.formats import Rendered, prompt_for
from sorsa_ds.data.tokenize import (
    IGNORED,
    TOO_LONG,
    Encoded,
    Encoder,
    encode,
    encode_all,
    encode_rows,
    show_example,
)
from tests.helpers import small_data
from tests.helpers.chat_families import assistant, user
from tests.helpers.chat_tokenizer import CHATML, chat_tokenizer
from tests.helpers.llama_tokenizer import llama_tokenizer
from tests.helpers.rendering import layout, render

MIXED = "Ünï — 日本 🙂👩‍👩‍👧\r\n\ttwo  spaces\r\n#### 1,234"


@pytest.fixture(params=["made", "stories260k"])
def sentencepiece(request):
    """A Llama tokenizer with bytes for rare characters; it puts a BOS before each text. Its pad token is <unk>."""
    return tokenizer_of(request.param, request)


@pytest.fixture(params=["bytes", pytest.param("embedded", marks=pytest.mark.slow), "made", "stories260k"])
def tokenizer(request):
    return tokenizer_of(request.param, request)


def tokenizer_of(name, request):
    """Two that are made here, the embedded model's, and a published one of Llama's kind."""
    if name == "bytes":
        return chat_tokenizer()
    if name == "made":
        return llama_tokenizer()
    if name == "embedded":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("embedded_model"))
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_data") / "models" / name)


def learned_text(example, tokenizer):
    """What the learned tokens say."""
    ids, labels = example["input_ids"], example["labels"]
    learned = labels != IGNORED
    assert (labels[learned] == ids[learned]).all()
    return tokenizer.decode(ids[learned].tolist()).removeprefix(" ")


@pytest.mark.parametrize(
    ("name", "row", "response"),
    [
        ("metamath", {"query": MIXED, "response": MIXED}, MIXED),
        ("codefeedback", {"query": "q", "answer": "```\nx = {}\n```"}, "```\nx = {}\n```"),
        ("alpaca", {"instruction": "i", "input": MIXED, "output": "o"}, "o"),
        ("gsm8k", {"question": "1+1?", "answer": "2\n#### 2"}, "2\n#### 2"),
        ("text", {"text": "x\n" + MIXED}, "x\n" + MIXED),
    ],
)
def test_exactly_the_response_and_the_end_token_are_learned(name, row, response, tokenizer):
    example = encode(render(row, name, tokenizer), tokenizer, 1000)
    if name == "text" and not len(tokenizer("")["input_ids"]):
        response = response[1:]  # nothing comes before the first token, to predict it from
    assert learned_text(example, tokenizer) == response + tokenizer.eos_token
    assert example["labels"][-1] == tokenizer.eos_token_id


def test_whole_data_sets_learn_their_answers(tmp_path, tokenizer):
    check_answers(small_data.gsm8k(tmp_path), small_data.alpaca(tmp_path), tokenizer)


def test_real_rows_learn_their_answers(shared_data, tokenizer):
    check_answers(shared_data / "gsm8k", shared_data / "alpaca", tokenizer)


def check_answers(gsm8k, alpaca, tokenizer):
    """Up to 200 rows of each learn exactly their answers."""
    rows = [json.loads(line) for line in (gsm8k / "train.jsonl").read_text().splitlines()[:200]]
    rows += [row for row in json.loads((alpaca / "alpaca_en_demo.json").read_text())[:200] if row["output"]]
    for row in rows:
        name, column = ("gsm8k", "answer") if "answer" in row else ("alpaca", "output")
        example = encode(render(row, name, tokenizer), tokenizer, 10_000)
        assert learned_text(example, tokenizer) == row[column] + tokenizer.eos_token


def test_generation_sees_the_tokens_of_training(tokenizer):
    example = encode(render({"question": "1+1?", "answer": "Two."}, "gsm8k", tokenizer), tokenizer, 1000)
    masked = example["input_ids"][example["labels"] == IGNORED]
    assert masked.tolist() == tokenizer(prompt_for("1+1?"))["input_ids"]


def test_a_token_across_the_boundary_is_learned():
    tokenizer = chat_tokenizer()
    ids = tokenizer("hello there")["input_ids"]
    start = tokenizer("hello there", return_offsets_mapping=True)["offset_mapping"][1][0]
    example = encode(Rendered("hello there", ((start + 1, 11),), closed=False), tokenizer, 100)
    assert example["labels"].tolist() == [IGNORED, *ids[1:]]
    beside = encode(Rendered("hello there", ((0, start),), closed=False), tokenizer, 100)
    assert (beside["labels"][1:] == IGNORED).all()


def test_a_character_of_several_tokens_is_learned_whole(tokenizer):
    example = encode(Rendered("ab𓀀cd", ((2, 3),), closed=False), tokenizer, 100)
    assert (example["labels"] != IGNORED).sum() >= 4
    assert learned_text(example, tokenizer) == "𓀀"


def test_end_and_pad_tokens_are_not_told_by_their_ids():
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    prompt = "a<|im_end|>b"
    example = encode(Rendered(prompt + "c<|im_end|>d", ((len(prompt), len(prompt) + 12),), True), tokenizer, 100)
    assert learned_text(example, tokenizer) == "c<|im_end|>d<|im_end|>"
    assert example["input_ids"].tolist().count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize("length", [1, 2, 30, 31, 32])
def test_a_cut_example_learns_what_is_left_and_no_end(length, tokenizer):
    rendered = render({"text": "one two three " * 20}, "text", tokenizer)
    whole, cut = encode(rendered, tokenizer, 1000), encode(rendered, tokenizer, length)
    for key in ("input_ids", "labels"):
        assert cut[key].tolist() == whole[key][:length].tolist()
    assert tokenizer.eos_token_id not in cut["input_ids"]


def test_the_end_token_counts_in_the_length(tokenizer):
    rendered = render({"text": "hello there"}, "text", tokenizer)
    whole = encode(rendered, tokenizer, 1000)["input_ids"].tolist()
    assert encode(rendered, tokenizer, len(whole))["input_ids"].tolist() == whole
    assert encode(rendered, tokenizer, len(whole) - 1)["input_ids"].tolist() == whole[:-1]


def test_bos_is_there_once_and_never_learned(sentencepiece):
    bos = sentencepiece.bos_token_id
    for text in ("hello", "<s>hello"):
        example = encode(Rendered(text, ((0, len(text)),), closed=False), sentencepiece, 100)
        assert example["input_ids"].tolist().count(bos) == 1
        assert example["input_ids"][0] == bos
        assert example["labels"][0] == IGNORED
        assert example["labels"][1] != IGNORED


def test_an_end_token_that_the_tokenizer_appends_is_not_doubled():
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    closed = encode(Rendered("a b", ((0, 3),), closed=True), tokenizer, 100)["input_ids"].tolist()
    assert closed == tokenizer("a b")["input_ids"]
    assert encode(Rendered("a b", ((0, 3),), closed=False), tokenizer, 100)["input_ids"].tolist() == closed[:-1]


def test_a_conversation_of_several_turns(tokenizer):
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello 🙂"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4\r\nfour"},
    ]
    example = encode(render({"messages": messages}, "chat", tokenizer), tokenizer, 1000)
    assert learned_text(example, tokenizer) == "Hello 🙂<|im_end|>4\r\nfour<|im_end|>"


def test_examples_without_a_learned_token_are_dropped_and_counted(tokenizer):
    rows = Dataset.from_list(
        [{"question": "q", "answer": "a"}, {"question": "long " * 500, "answer": "a"}, {"question": "q", "answer": ""}]
    )
    examples, left_out, cut, _ = encode_all(rows, layout("auto", rows), tokenizer, 400, "data.jsonl")
    assert (len(examples), left_out.total(), cut) == (1, 2, 0)
    assert left_out["column 'answer', which is to be learned, is blank"] == 1
    assert learned_text(examples[0], tokenizer) == "a" + tokenizer.eos_token


def test_examples_that_lose_their_end_are_counted(tokenizer):
    whole = encode(Rendered("a b c", ((0, 5),), closed=True), tokenizer, 1000)
    most = len(whole["input_ids"])
    rows = Dataset.from_list([{"text": "a b c"}, {"text": "a b c d"}, {"text": "a b c d e f g"}])
    for max_length, cut in ((1000, 0), (most, 2), (most - 1, 3)):
        found = encode_all(rows, layout("text", rows), tokenizer, max_length, "stories")
        assert (found.cut, found.left_out.total(), len(found.examples)) == (cut, 0, 3)
        assert max(len(example["input_ids"]) for example in found.examples) <= max_length


def test_many_rows_keep_their_order_and_equal_single_ones(monkeypatch, tokenizer):
    monkeypatch.setattr("sorsa_ds.data.tokenize.ROWS_PER_CALL", 3)
    rows = Dataset.from_list([{"text": f"story {number} " * (number % 4 + 1)} for number in range(10)])
    examples, left_out, *_ = encode_all(rows, layout("text", rows), tokenizer, 50, "stories")
    assert not left_out
    for row, example in zip(rows, examples, strict=True):
        alone = encode(render(row, "text", tokenizer), tokenizer, 50)
        assert {key: value.tolist() for key, value in example.items()} == {
            key: value.tolist() for key, value in alone.items()
        }


def test_nothing_left_to_learn_names_the_data_and_the_mend(tokenizer):
    rows = Dataset.from_list([{"question": "q", "answer": "a"}] * 3)
    with pytest.raises(ValueError, match=r"my\.jsonl: no token to learn in any of 3 rows .*data.max_length \(8\)"):
        encode_all(rows, layout("gsm8k", rows), tokenizer, 8, "my.jsonl")


def test_rows_that_are_all_left_out_are_told_with_the_reason(tokenizer):
    rows = Dataset.from_list([{"question": "q", "answer": ""}] * 3)
    with pytest.raises(ValueError, match=r"in any of 3 rows \(column 'answer', which is to be learned, is blank: 3\)"):
        encode_all(rows, layout("gsm8k", rows), tokenizer, 100, "my.jsonl")


def test_errors_name_the_data_and_the_row(tokenizer):
    rows = Dataset.from_list([{"question": "q", "answer": None}, {"question": "q", "answer": True}])
    with pytest.raises(ValueError, match=r"my\.jsonl, row 2: column 'answer' holds True where text is needed"):
        encode_all(rows, layout("auto", rows), tokenizer, 100, "my.jsonl")


def test_tokenizers_that_cannot_do_it_are_refused():
    endless = chat_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        encode(Rendered("a b", ((0, 3),), closed=True), endless, 10)

    class SlowTokenizer(PreTrainedTokenizer):
        """Only what its constructor asks for."""

        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ValueError, match=r"SlowTokenizer does not say where its tokens lie .*tokenizer\.json"):
        encode(Rendered("a b", ((0, 3),), closed=True), SlowTokenizer(), 10)


def test_rows_that_are_stored_as_tokens_need_no_fast_tokenizer():
    class SlowTokenizer(PreTrainedTokenizer):
        """Knows ten tokens, and makes none of a text."""

        vocab_size = 10

        def get_vocab(self) -> dict[str, int]:
            return {str(number): number for number in range(10)}

        def _tokenize(self, text, **kwargs):
            raise AssertionError("it is given a text")

    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2)
    encoder = Encoder.of(DataConfig(), rows.column_names, SlowTokenizer(), "rows")
    found = encode_rows(rows, 0, encoder).examples
    assert [example["labels"].tolist() for example in found] == [[IGNORED, 6, 7]] * 2


def test_stored_and_written_rows_keep_their_order(tokenizer):
    stored = Rendered("", (), closed=False, tokens=([5, 6], [5, 6]))
    written = Rendered("a b", ((0, 3),), closed=True)
    alone = encode(written, tokenizer, 10)
    found = list(module._encoded([stored, written, stored, written], tokenizer))
    assert [example["labels"].tolist() for example in found[::2]] == [[IGNORED, 6]] * 2
    assert all(example["labels"].tolist() == alone["labels"].tolist() for example in found[1::2])


def test_what_a_tokenizer_and_a_template_are_asked_once_is_asked_once_for_many_rows(monkeypatch):
    asked = Counter()

    def counted(where, name):
        real = getattr(where, name)

        def count(*args):
            asked[name] += 1
            return real(*args)

        monkeypatch.setattr(where, name, count)

    counted(chat, "special_pattern")
    counted(chat_templates, "trl_templates")
    chat_templates.marked_template.cache_clear()
    rows = Dataset.from_list([{"messages": [user("Hi"), assistant(f"Hello {number}")]} for number in range(20)])
    encoder = Encoder.of(DataConfig(), rows.column_names, chat_tokenizer(), "rows")
    for start in (0, 10):
        assert len(encode_rows(rows.select(range(start, start + 10)), start, encoder).examples) == 10
    assert asked == {"special_pattern": 1, "trl_templates": 1}


def test_an_example_is_shown_with_its_parts_told_apart(tokenizer):
    example = encode(render({"question": "1+1?", "answer": "Two."}, "gsm8k", tokenizer), tokenizer, 1000)
    shown = show_example(example, tokenizer)
    masked, learned = (example["labels"] == IGNORED).sum(), (example["labels"] != IGNORED).sum()
    assert shown.startswith(f"--- masked, {masked} tokens ---\n")
    before, after = shown.split(f"--- learned, {learned} tokens ---\n")
    assert before.endswith("1+1?\n\n### Response:\n")
    assert after.strip() == "Two." + tokenizer.eos_token


def encoded(texts: list[str], tokenizer, most: int, truncation: str) -> Encoded:
    """Rows of gsm8k that answer with these texts, as examples of at most so many tokens."""
    rows = Dataset.from_list([{"question": "How many?", "answer": text} for text in texts])
    data = DataConfig(max_length=most, truncation=truncation)
    return encode_rows(rows, 0, Encoder.of(data, rows.column_names, tokenizer, "data.jsonl"))


def test_on_the_left_the_response_stays_and_a_bos(tokenizer):
    [whole] = encoded(["one two three four"], tokenizer, 1000, "left").examples
    learned = int((whole["labels"] != IGNORED).sum())
    has_bos = int(whole["input_ids"][0] == tokenizer.bos_token_id)
    for most in (len(whole["labels"]) - 1, learned + 3):
        found = encoded(["one two three four"], tokenizer, most, "left")
        [example] = found.examples
        assert (found.cut, len(example["labels"])) == (1, most)
        assert learned_text(example, tokenizer) == "one two three four" + tokenizer.eos_token
        assert example["input_ids"][has_bos:].tolist() == whole["input_ids"][has_bos - most :].tolist()
        assert (example["input_ids"][0] == tokenizer.bos_token_id) == has_bos


def test_a_marker_of_turns_is_no_bos_though_the_tokenizer_calls_it_so():
    tokenizer = chat_tokenizer()
    turns = [{"role": "user", "content": "Why? " * 9}, {"role": "assistant", "content": "So."}]
    rows = Dataset.from_list([{"messages": turns}])
    encoder = Encoder.of(DataConfig(max_length=20, truncation="left"), rows.column_names, tokenizer, "rows")
    [example] = encode_rows(rows, 0, encoder).examples
    assert example["input_ids"][0] != tokenizer.bos_token_id
    assert tokenizer.decode(example["input_ids"]).endswith("Why? <|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>")


def test_a_response_that_is_cut_on_the_left_does_not_learn_its_first_token():
    tokenizer = chat_tokenizer()
    [example] = encoded(["one two three " * 20], tokenizer, 9, "left").examples
    assert example["labels"][0] == IGNORED
    assert example["labels"][1:].tolist() == example["input_ids"][1:].tolist()
    assert example["labels"][-1] == tokenizer.eos_token_id


def test_long_rows_are_dropped_and_counted_or_stop_the_run(tokenizer):
    [short] = encoded(["one"], tokenizer, 1000, "drop").examples
    texts, most = ["one", "one two three", "one"], len(short["labels"])
    found = encoded(texts, tokenizer, most, "drop")
    assert (len(found.examples), found.cut, dict(found.left_out)) == (2, 0, {TOO_LONG: 1})
    with pytest.raises(ValueError, match=rf"^data\.jsonl, row 2: it has \d+ tokens, more .*max_length \({most}\)"):
        encoded(texts, tokenizer, most, "error")
    assert len(encoded(texts[::2], tokenizer, most, "error").examples) == 2


def test_counts_hold_every_row_and_token(tokenizer):
    found = encoded(["one", "", "two " * 400], tokenizer, 200, "drop")
    counts = found.counts + found.counts
    assert counts.rows == 6 == counts.learned_rows + sum(counts.left_out.values())
    assert set(counts.left_out.values()) == {2}
    assert counts.tokens == 2 * len(found.examples[0]["labels"])
    assert counts.learned_tokens == 2 * int((found.examples[0]["labels"] != IGNORED).sum())
