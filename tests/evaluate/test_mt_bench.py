"""MT-Bench: two turns in FastChat's format, and judgements by a service, which is a stand-in on this machine."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorsa_ds.evaluate.backends import chat_service
from sorsa_ds.evaluate.backends.chat_service import KEY_VARIABLE
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.records import read_samples
from sorsa_ds.evaluate.tasks import mt_bench
from sorsa_ds.evaluate.tasks.judge import case_of, rating
from sorsa_ds.evaluate.tasks.task import Setting
from sorsa_ds.model.generation import Prompt, _Drawing
from sorsa_ds.study.compare.score import Evaluation
from tests.helpers.chat_server import serving
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.evaluated import asked, run
from tests.helpers.worlds import run_ranks

KEY = "key-of-nobody-123"
ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["What is 1 plus 1?", "Say it again."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 plus 2?", "And twice that?"], "reference": ["4", ""]},
    {"question_id": 112, "category": "math", "turns": ["What is 3 plus 3?", "And now?"], "reference": ["6", "seven"]},
    {"question_id": 121, "category": "coding", "turns": ["What is 4 plus 4?", "Why?"]},
    {"question_id": 142, "category": "stem", "turns": ["What is 5 plus 5?", "Why?"], "reference": ["10", ""]},
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(chat_service, "WAITS", (0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="module")
def questions(trained):
    (trained / "mt_bench").mkdir()
    (trained / "mt_bench" / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return trained / "mt_bench"


def _asked(trained, questions, name, **changes):
    options = dict(task="mt_bench", data=str(questions), max_new_tokens=12, batch_size=3)
    return asked(trained, name, **{**options, **changes})


@pytest.fixture(scope="module")
def answered(trained, questions):
    """Results and samples without a judge."""
    return run_ranks(1, run, _asked(trained, questions, "answered"))[0]


def _lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _settings(tmp_path, tokenizer=None, positions=None):
    return Setting(tokenizer or chat_tokenizer(), tmp_path, positions, True, tmp_path / "results")


def _file(folder, rows):
    file = folder / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.slow
def test_answers_are_in_fastchats_format_and_the_second_sees_the_first(trained, answered):
    results, samples = answered
    lines = _lines(trained / "answered" / "model_answer" / "model.jsonl")
    assert [line["question_id"] for line in lines] == [row["question_id"] for row in ROWS]
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    for row, line, sample in zip(ROWS, lines, samples, strict=True):
        assert line.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "model"
        assert line["choices"] == [{"index": 0, "turns": sample["turns"]}]
        if row["category"] in ("writing", "stem"):
            continue  # drawn
        messages = []
        for turn, answer in zip(row["turns"], line["choices"][0]["turns"], strict=True):
            messages.append({"role": "user", "content": turn})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = len(ids)
            with torch.no_grad():
                while len(ids) < start + 12:
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == tokenizer.eos_token_id:
                        break
            assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": answer})
    assert results["conversations"] == len(ROWS)
    assert "judge" not in results
    assert "score" not in results


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (5, 2)])
def test_neither_the_batch_nor_the_ranks_change_a_drawn_answer(trained, questions, answered, batch, ranks):
    name = f"batch-{batch}-{ranks}"
    samples = run_ranks(ranks, run, _asked(trained, questions, name, batch_size=batch))[0][1]
    assert [sample["turns"] for sample in samples] == [sample["turns"] for sample in answered[1]]


@pytest.mark.slow
def test_another_seed_draws_other_answers_where_there_is_a_temperature(trained, questions, answered):
    samples = run_ranks(1, run, _asked(trained, questions, "seed", seed=1))[0][1]
    same = {
        sample["category"]: sample["turns"] == other["turns"]
        for sample, other in zip(samples, answered[1], strict=True)
    }
    assert same["writing"] is False
    assert same["math"] is same["coding"] is True
    with pytest.raises(AssertionError, match="differing in questions"):
        run_ranks(1, run, _asked(trained, questions, "seed", seed=2))


def test_tokens_are_drawn_from_the_softmax_at_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    prompts = [Prompt("", [1], 1, 0.7, seed) for seed in range(4000)] + [Prompt("", [1], 1)]
    scores = _Drawing(prompts, torch.device("cpu"))(torch.zeros(1), logits.repeat(len(prompts), 1))
    drawn = torch.bincount(scores[:-1].argmax(1), minlength=4) / 4000
    assert drawn.tolist() == pytest.approx((logits / 0.7).softmax(0).tolist(), abs=0.03)
    assert scores[-1].tolist() == logits.tolist()


@pytest.mark.slow
def test_a_judge_rates_each_turn_and_the_key_is_nowhere(trained, questions, answered, capfd):
    def reply(body, before):
        text = body["messages"][1]["content"]
        if "What is 1 plus 1?" in text and not before:
            return 429, {"Retry-After": "0.01"}, "slow down"
        if "twice that" in text:
            return f"I would say nine out of ten. You sent: Bearer {KEY}"
        return "As in [[3]], but better.\nRating: [[8.5]]" if "Rate only" in body["messages"][0]["content"] else "[[6]]"

    with serving(reply) as server:
        options = _asked(trained, questions, "answered", judge_url=server.url, judge_model="org/judge-1")
        results, samples = run_ranks(2, run, options)[0]
    assert samples == answered[1], "the answers were there"
    assert len(server.asked) == 12
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert results["turn_1"] == 6
    assert results["turn_2"] == 8.5
    assert results["score"] == pytest.approx((5 * 6 + 4 * 8.5) / 9)
    assert results["judge"]["unparsable"] == results["unparsable"] == results["groups"]["math"]["unparsable"] == 1
    assert results["groups"]["math"]["score"] == pytest.approx((6 + 6 + 8.5) / 3)
    assert results["groups"]["coding"] == {
        "score": 7.25, "turn_1": 6, "turn_2": 8.5, "judgements": 2, "unparsable": 0
    }  # fmt: skip
    lines = _lines(trained / "answered" / "model_judgment" / "org-judge-1_single.jsonl")
    assert [(line["question_id"], line["turn"]) for line in lines] == [
        (row["question_id"], turn) for row in ROWS for turn in (1, 2)
    ]
    assert Counter(line["score"] for line in lines) == {6: 5, 8.5: 4, -1: 1}
    assert {line["model"] for line in lines} == {"model"}
    assert {line["judge"][0] for line in lines} == {"org/judge-1"}
    written = [path for path in (trained / "answered").rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert all(KEY not in path.read_text() for path in written)
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err


@pytest.mark.slow
def test_a_judge_that_never_rates_is_named_and_asked_again_by_the_same_command(trained, questions, answered):
    told = r"third_single.jsonl: none of 10 judgements by third at .* the first says 'As you like it.'"
    with serving(lambda body, before: "As you like it.") as server:
        options = _asked(trained, questions, "answered", judge_url=server.url, judge_model="third")
        with pytest.raises(AssertionError, match=told):
            run_ranks(1, run, options)
    assert len(server.asked) == 10
    with serving(lambda body, before: "[[3]]") as server:
        options = _asked(trained, questions, "answered", judge_url=server.url, judge_model="third")
        assert run_ranks(1, run, options)[0][0]["score"] == 3
    assert len(server.asked) == 10


@pytest.mark.slow
def test_judging_goes_on_where_it_stopped(trained, questions, answered):
    def failing(body, before):
        return (500, {}, "the judge is ill") if "5 plus 5" in body["messages"][1]["content"] else "[[7]]"

    with serving(failing) as server:
        options = _asked(trained, questions, "answered", judge_url=server.url, judge_model="second")
        with pytest.raises(AssertionError, match="after 3 attempts: status 500: the judge is ill"):
            run_ranks(1, run, options)
    file = trained / "answered" / "model_judgment" / "second_single.jsonl"
    made = _lines(file)
    assert made
    with file.open("a") as half:
        half.write('{"question_id": 81, "tur')
    with serving(lambda body, before: "[[7]]") as server:
        results = run_ranks(1, run, _asked(
            trained, questions, "answered", judge_url=server.url, judge_model="second"
        ))[0][0]  # fmt: skip
    assert len(server.asked) == 10 - len(made)
    assert results["score"] == 7
    assert results["judge"]["judgements"] == len(_lines(file)) == 10
    assert read_samples(trained / "answered") == answered[1]
    with serving(lambda body, before: "[[1]]") as server:
        again = run_ranks(1, run, _asked(
            trained, questions, "answered", judge_url=server.url, judge_model="second"
        ))[0][0]  # fmt: skip
    assert server.asked == []
    assert again["score"] == 7


@pytest.mark.slow
def test_a_conversation_without_room_counts(trained, questions):
    rows = [
        {"question_id": "long", "category": "math", "turns": ["Why? " * 400, "And?"]},
        {"question_id": "then", "category": "math", "turns": ["What is 1 plus 1?", "Why? " * 400]},
    ]
    options = _asked(trained, questions, "no-room", data=_file(trained, rows), batch_size=1)
    results, samples = run_ranks(1, run, options)[0]
    assert [sample["too_long"] for sample in samples] == [[True, True], [False, True]]
    assert results["too_long"] == 3
    assert results["truncated"] <= 1


@pytest.mark.parametrize("style", ["papers", "plain", "chat"])
def test_conversations_in_every_style(tmp_path, style):
    options = Options(model="m", task="mt_bench", data=_file(tmp_path, ROWS), prompt=style)
    task = mt_bench.build(options, _settings(tmp_path))
    first = task.notes()[0]
    assert "What is 1 plus 1?" in first
    second = task._prompt("mt_bench/81", [("What is 1 plus 1?", "Two.")])
    text = chat_tokenizer().decode(second.token_ids)
    assert text.index("Two.") < text.index("Say it again.")
    expected = {"papers": "### Response:", "plain": "\nAnswer:", "chat": "<|im_start|>assistant\n"}
    assert text.endswith(expected[style])
    task.close()


def test_temperatures_and_limits_are_fastchats(tmp_path, request):
    file = request.getfixturevalue("shared_data") / "mt_bench"
    task = mt_bench.build(Options(model="a/b c", task="mt_bench", data=str(file)), _settings(tmp_path))
    assert len(task.ids) == 80
    temperatures = {task._questions[p.id]["category"]: p.temperature for p in task._first.values()}
    assert temperatures == {
        "writing": 0.7, "roleplay": 0.7, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0, "stem": 0.1,
        "humanities": 0.1,
    }  # fmt: skip
    assert {prompt.limit for prompt in task._first.values()} == {1024}
    assert len({prompt.seed for prompt in task._first.values()}) == 80
    assert task._model_id == "b-c"
    rows = [json.loads(line) for line in (file / "question.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{"reference": None, **row} for row in rows] == list(task._questions.values())
    limited = mt_bench.build(Options(model="m", task="mt_bench", data=str(file), limit=16), _settings(tmp_path))
    assert set(Counter(row["category"] for row in limited._questions.values()).values()) == {2}
    roles = Counter(case_of(row, ["a", "b"], 2).role for row in task._questions.values())
    assert roles == {"sorsa-reference-turn-2": 29, "sorsa-general-turn-2": 51}


def test_what_the_judge_is_given():
    first = case_of({"reference": None, **ROWS[0]}, ["Two.", "Two!"], 1)
    assert first.role == "sorsa-general-turn-1"
    assert "Two." in first.user
    assert "Two!" not in first.user
    second = case_of(ROWS[1], ["Four.", "Eight."], 2)
    assert second.role == "sorsa-reference-turn-2"
    assert second.user.count("[Reference answer") == 1
    places = [second.user.index(text) for text in ("2 plus 2", "]\n4\n", "Four.", "twice that", "Eight.")]
    assert places == sorted(places)
    assert case_of(ROWS[4], ["Ten."], 1).role == "sorsa-general-turn-1"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7), ("[[ 9.5 ]]", 9.5), ("[[3]] or rather [[4]]", 4), ("[[8/10]]", 8), ("[[10]]", 10),
        ("[7]", None), ("[[0]]", None), ("[[11]]", None), ("[[N]]", None), ("", None), ("[[-2]]", None),
    ],
)  # fmt: skip
def test_ratings(text, score):
    assert rating(text) == score


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"turns": ["a"]}, "row 6: turns holds .* where a list of two texts"),
        ({"category": None}, "row 6: category holds None"),
        ({"question_id": 81}, "same question_id twice"),
        ({"reference": "four"}, "reference"),
    ],
)
def test_rows_that_are_no_questions_are_refused(tmp_path, row, told):
    file = _file(tmp_path, [*ROWS, {**ROWS[0], "question_id": 7, **row}])
    with pytest.raises(ValueError, match=told):
        mt_bench.build(Options(model="m", task="mt_bench", data=file), _settings(tmp_path))


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="--task mt_bench needs --data, a file of questions"):
        mt_bench.build(Options(model="m", task="mt_bench"), _settings(tmp_path))
    with pytest.raises(ValueError, match="there is no someone/questions"):
        mt_bench.build(Options(model="m", task="mt_bench", data="someone/questions"), _settings(tmp_path))
    options = Options(model="m", task="mt_bench", data=_file(tmp_path, ROWS))
    with pytest.raises(ValueError, match=r"--prompt chat, question mt_bench/81, turn 1: .*chat template"):
        mt_bench.build(options, _settings(tmp_path, chat_tokenizer(template=None)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": "gsm8k", "judge_url": "http://h", "judge_model": "m"}, "--judge_url goes with --task mt_bench"),
        ({"task": "gsm8k", "seed": 1}, "--seed goes with"),
        ({"judge_url": "http://h"}, "--judge_url needs --judge_model"),
        ({"judge_model": "m"}, "--judge_model needs --judge_url"),
        ({"judge_temperature": 1.0}, "--judge_temperature needs a judge"),
        ({"judge_url": "http://h", "judge_model": "m", "judge_temperature": 3.0}, "from 0 to 2"),
        ({"num_few_shot": 2}, "--num_few_shot goes with"),
    ],
)
def test_options_of_the_judge_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        Options(**{"model": "m", "task": "mt_bench", **changes})


def test_a_comparison_does_not_ask_a_judge():
    with pytest.raises(ValueError, match="a comparison measures no 'mt_bench'"):
        Evaluation("mt_bench", "")
