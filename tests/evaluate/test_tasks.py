"""The tasks: their prompts, their data in every layout, and figures equal to independent computations."""

import gzip
import json
import math
import shutil
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.evaluate.datasets import drawn_evenly
from sorsa_ds.evaluate.options import Options, parse
from sorsa_ds.evaluate.prompts import prompt_tokens
from sorsa_ds.evaluate.tasks import gsm8k, humaneval, loss, mmlu
from sorsa_ds.evaluate.tasks import math as math_task
from sorsa_ds.evaluate.tasks.generated import continuation
from sorsa_ds.evaluate.tasks.task import Setting
from tests.helpers import small_data
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.evaluated import asked, run
from tests.helpers.grader_cases import MATH
from tests.helpers.llama_tokenizer import llama_tokenizer
from tests.helpers.worlds import run_ranks


@pytest.fixture(params=["made", "real"])
def data(request, tmp_path_factory):
    """A function: name of a published data set -> a folder, of data in its layout and of the set itself."""
    if request.param == "real":
        return request.getfixturevalue("shared_data").joinpath
    return lambda name: getattr(small_data, name)(tmp_path_factory.mktemp("data") / name)


@pytest.fixture(params=["made", "stories260k"])
def llama_like(request):
    """Tokenizers of Llama's kind."""
    if request.param == "made":
        return llama_tokenizer()
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_data") / "models" / request.param)


def test_an_answer_keeps_the_space_that_it_begins_with(llama_like, data):
    """A tokenizer of Llama's kind leaves it out of what is decoded alone: a function's body would lose its indent."""
    tokenizer = llama_like
    with gzip.open(data("humaneval") / "HumanEval.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows[:: max(1, len(rows) // 4)]:
        before = prompt_tokens(row["prompt"], tokenizer)
        answer = prompt_tokens(row["prompt"] + row["canonical_solution"], tokenizer)[len(before) :]
        assert continuation(tokenizer, before, answer) == row["canonical_solution"]
        assert tokenizer.decode(answer) != row["canonical_solution"]


def test_a_judgement_belongs_to_its_reference(setting, tmp_path):
    digests = set()
    for number in ("4", "5"):
        (tmp_path / number).mkdir()
        row = {"question": "What is 2 plus 2?", "answer": f"So.\n#### {number}"}
        (tmp_path / number / "test.jsonl").write_text(json.dumps(row))
        options = Options(model="m", task="gsm8k", data=str(tmp_path / number), num_few_shot=0)
        digests.add(gsm8k.build(options, setting).digest())
    assert len(digests) == 2


@pytest.fixture
def setting(tmp_path):
    return Setting(chat_tokenizer(), tmp_path, None)


def _prompts(task):
    return [question.prompt for question in task._questions.values()]


def test_a_response_with_examples_looks_like_the_ones_that_were_trained_on(setting, data):
    folder = data("gsm8k")
    options = Options(model="m", task="gsm8k", data=str(folder), limit=3, num_few_shot=2)
    task = gsm8k.build(options, setting)
    parts = _prompts(task)[0].split("### Response:")
    assert len(parts) == 4
    first = {"train": "Mara picked", "test": "Ivo’s hens"}
    if "Natalia" in (folder / "train.jsonl").read_text(encoding="utf-8"):
        first = {"train": "Natalia sold", "test": "Janet’s ducks"}
    assert first["train"] in parts[0]
    assert parts[1].startswith(" Let's think step by step. ")
    assert " 48/2 = 24 " in parts[1].partition("\n")[0]
    assert "\nThe answer is: 72\n\nBelow is an instruction" in parts[1]
    assert "<<" not in "".join(parts)
    assert first["test"] in parts[2]
    assert parts[3] == " Let's think step by step."
    assert task.ids == ["gsm8k/0", "gsm8k/1", "gsm8k/2"]


def test_chat_and_plain_prompts(setting, data):
    data = str(data("gsm8k"))
    chat = gsm8k.build(Options(model="m", task="gsm8k", data=data, limit=1, num_few_shot=1, prompt="chat"), setting)
    text = _prompts(chat)[0]
    assert text.count("<|im_start|>user") == 2
    assert text.endswith("<|im_start|>assistant\n")
    assert text.count('"The answer is:" and the result.') == 2
    plain = gsm8k.build(Options(model="m", task="gsm8k", data=data, limit=1, prompt="plain"), setting)
    assert _prompts(plain)[0].startswith(("Question: Ivo’s hens", "Question: Janet"))
    assert _prompts(plain)[0].endswith("\nAnswer:")
    without = Setting(chat_tokenizer(template=None), setting.folder, None)
    with pytest.raises(ValueError, match="chat template"):
        gsm8k.build(Options(model="m", task="gsm8k", data=data, limit=1, prompt="chat"), without)
    broken = Setting(chat_tokenizer(template="{{ 1 / 0 }}"), setting.folder, None)
    with pytest.raises(ValueError, match=r"--prompt chat, question gsm8k/0: .* fails, in its line 1: ZeroDivision"):
        gsm8k.build(Options(model="m", task="gsm8k", data=data, limit=1, prompt="chat"), broken)


def test_math_is_read_in_the_published_layout_and_as_rows(setting, tmp_path):
    for number, row in enumerate(MATH):
        for split in ("train", "test"):
            folder = tmp_path / "MATH" / split / row["type"].lower().replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.json").write_text(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MATH))
    by_folder = math_task.build(Options(model="m", task="math", data=str(tmp_path / "MATH"), num_few_shot=1), setting)
    by_split = math_task.build(Options(model="m", task="math", data=str(tmp_path / "MATH" / "test")), setting)
    by_rows = math_task.build(Options(model="m", task="math", data=str(tmp_path / "rows.jsonl")), setting)
    assert len(by_folder.ids) == len(by_rows.ids) == len(MATH)
    assert sorted(_prompts(by_split)) == sorted(_prompts(by_rows))
    assert "\nThe answer is: \\frac{1}{2}\n\nBelow" in _prompts(by_folder)[0]
    records = [
        {"id": id_, "correct": "Level 1" in question.groups, "outcome": "right", "ended": True, "tokens": 1}
        for id_, question in by_rows._questions.items()
    ]
    groups = by_rows.results(records)["groups"]
    assert groups["Level 1"]["accuracy"] == 1
    assert groups["Level 3"]["accuracy"] == 0
    assert groups["Algebra"]["total"] == 4
    with pytest.raises(ValueError, match="--task math needs --data"):
        math_task.build(Options(model="m", task="math"), setting)
    (tmp_path / "MATH" / "test" / "algebra" / "99.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"99\.json: list"):
        math_task.build(Options(model="m", task="math", data=str(tmp_path / "MATH")), setting)


@pytest.mark.parametrize(
    ("answer", "ends_with"),
    [
        ("```python\ndef f(x):\n    return x\n```\nSo.", "import os\n\n\n\ndef f(x):\n    return x\n"),
        ("Two:\n```\ndef g(): pass\n```\n```py\ndef f(x):\n    return 2\n```", "def f(x):\n    return 2\n"),
        ("```\ndef f(x): return 1\n```\nNo:\n```\ndef f(x): return 2\n```\n```\nf(1)\n```", "def f(x): return 2\n"),
        ("```bash\npip install f\n```\nThen:\n```python\ndef f(x):\n    return 2\n```", "def f(x):\n    return 2\n"),
        ("1. So:\n   ```python\n   def f(x):\n\n       return x\n   ```", "def f(x):\n\n    return x\n"),
        ("```\n    return 1\n```\nor\n```\n    return 2\n```", '    """Same."""\n    return 2\n'),
        ("  ```python\n      return x\n  ```", '    """Same."""\n    return x\n'),
        ("def f(x):\n    return x\n\nprint(f(1))", "def f(x):\n    return x\n"),
        ("    return x\n\ndef other(): pass", '    """Same."""\n    return x\n'),
        ("```python\n    return x\n```", '    """Same."""\n    return x\n'),
        ("Sure:\nimport re\ndef f(x):\n    return x", "import re\ndef f(x):\n    return x"),
        ("Sure:\nasync def f(x):\n    return x\n\nf(1)", "async def f(x):\n    return x\n"),
    ],
)
def test_the_program_in_an_answer_is_found(answer, ends_with):
    row = {"prompt": 'import os\n\n\ndef f(x):\n    """Same."""\n', "entry_point": "f", "test": ""}
    code = humaneval.code_of(row, answer)
    assert code.strip().endswith(ends_with.strip())
    compile(code, "answer", "exec")


def test_nothing_is_executed_unless_it_is_allowed():
    with pytest.raises(ValueError, match="--allow_code_execution"):
        Options(model="m", task="humaneval")


@pytest.mark.slow
def test_functions_are_run_and_counted(trained):
    """The model writes a word: harmless where it falls into a comment."""
    easy = {"prompt": "def f():\n    pass\n# ", "test": "def check(f):\n    assert f() is None\n"}
    hard = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 3\n"}
    (trained / "problems.jsonl").write_text(
        "".join(
            json.dumps({"task_id": f"T/{n}", "entry_point": "f", **row}) + "\n" for n, row in enumerate((easy, hard))
        )
    )
    options = dict(task="humaneval", data=str(trained / "problems.jsonl"), allow_code_execution=True, prompt="plain")
    results, samples = run_ranks(2, run, asked(trained, "functions", **options, max_new_tokens=1))[0]
    assert results["total"] == 2
    assert {sample["id"] for sample in samples} == {"T/0", "T/1"}
    assert [sample["ended_with"] == "passed" for sample in samples] == [True, False]
    assert [sample["correct"] for sample in samples] == [True, False]
    assert results["correct"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "mmlu", "max_new_tokens": 3}, "--max_new_tokens goes with"),
        ({"task": "gsm8k", "window": 3}, "--window goes with"),
        ({"task": "mmlu", "backend": "vllm"}, "only generates"),
        ({"task": "gsm8k", "batch_size": 0}, "--batch_size"),
        ({"task": "gsm8k", "num_few_shot": -1}, "--num_few_shot"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(model="m", **changes)


def _mmlu(project, count=9):
    """A data set in the published layout: three subjects, commas and quotes in the cells."""
    folder = project / "mmlu"
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in ("high_school_sums", "logic", "spelling"):
            lines = [
                f'"What, is {n}?{" Really?" * (n % 3)}",{n},{n + 1},"{n}, or so",none,{"ABCD"[n % 4]}\n'
                for n in range(count)
            ]
            (folder / split / f"{subject}_{split}.csv").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_mmlu_is_the_argmax_of_independent_log_likelihoods(trained):
    data = _mmlu(trained)
    options = dict(task="mmlu", data=str(data), max_new_tokens=None, num_few_shot=1)
    runs = [
        run_ranks(ranks, run, asked(trained, f"mmlu-{size}-{ranks}", **options, batch_size=size))[0]
        for size, ranks in ((1, 1), (5, 2))
    ]
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    results, samples = runs[0]
    assert len(samples) == 27
    assert {sample["shots"] for sample in samples} == {1}
    for sample in samples:
        subject, number = sample["id"].split("/")
        n = int(number)
        shown = [
            f"What, is {k}?{' Really?' * (k % 3)}\nA. {k}\nB. {k + 1}\nC. {k}, or so\nD. none\nAnswer:" for k in (0, n)
        ]
        text = (
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            f"{shown[0]} A\n\n{shown[1]}"
        )
        nats = []
        for letter in "ABCD":
            ids = torch.tensor([tokenizer(f"{text} {letter}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].double().log_softmax(-1)
            nats.append(logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item())
        assert sample["answer"] == "ABCD"[int(np.argmax(nats))]
        gaps = np.subtract(sample["log_likelihoods"], sample["log_likelihoods"][0])
        assert gaps == pytest.approx(np.subtract(nats, nats[0]), abs=1e-4)
        assert sample["correct"] == (sample["answer"] == "ABCD"[n % 4])
    for other in runs[1][1]:
        same = next(sample for sample in samples if sample["id"] == other["id"])
        assert other["answer"] == same["answer"]
        assert other["log_likelihoods"] == pytest.approx(same["log_likelihoods"], abs=1e-4)
    assert results["accuracy"] == pytest.approx(sum(s["correct"] for s in samples) / 27)
    parts = [[s["correct"] for s in samples if s["subject"] == subject] for subject in results["groups"]]
    assert results["macro_accuracy"] == pytest.approx(sum(sum(p) / len(p) for p in parts) / 3)


def test_a_limited_number_is_drawn_evenly_over_subjects():
    sizes = {"algebra": 30, "biology": 2, "chemistry": 20, "dance": 9}
    items = [f"{subject}/{number}" for subject, size in sizes.items() for number in range(size)]

    def drawn(limit):
        return drawn_evenly(items, limit, lambda item: item.partition("/")[0])

    for limit in (1, 3, 4, 10, 30, 60, 61, 99, None):
        found = drawn(limit)
        assert len(set(found)) == len(found) == min(limit or 61, 61)
        assert found == drawn(limit) == [item for item in items if item in found]
        counts = {subject: sum(item.startswith(subject) for item in found) for subject in sizes}
        even = max(counts.values())
        assert all(min(sizes[subject], even) - count in (0, 1) for subject, count in counts.items())
        assert set(found) <= set(drawn(limit and limit + 1))
    assert drawn(40) != items[:40]
    assert [int(item.partition("/")[2]) for item in drawn(8)] != [0, 1] * 4  # not the first of each
    assert drawn_evenly(items, 5, lambda item: "") == items[:5]


def test_mmlu_and_math_draw_over_their_subjects(setting, tmp_path):
    options = Options(model="m", task="mmlu", data=str(_mmlu(tmp_path)), limit=6, num_few_shot=1)
    ids = mmlu.build(options, setting).ids
    assert Counter(id_.partition("/")[0] for id_ in ids) == dict.fromkeys(("high_school_sums", "logic", "spelling"), 2)
    rows = [{**MATH[0], "type": subject} for subject in ("Algebra", "Geometry") for _ in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = math_task.build(Options(model="m", task="math", data=str(tmp_path / "rows.jsonl"), limit=4), setting).ids
    assert [int(id_.partition("/")[2]) // 9 for id_ in ids] == [0, 0, 1, 1]


@pytest.mark.slow
def test_mmlu_takes_fewer_examples_where_the_model_has_no_room(trained):
    options = dict(task="mmlu", data=str(_mmlu(trained)), max_new_tokens=None, num_few_shot=5, limit=4)
    results, samples = run_ranks(1, run, asked(trained, "mmlu-5", **options))[0]
    assert all(sample["tokens"] <= 256 for sample in samples)
    assert all(sample["shots"] < 5 for sample in samples)
    assert results["total"] == 4


@pytest.mark.slow
def test_an_mmlu_question_that_is_too_long_loses_its_beginning(trained):
    data = _mmlu(trained)
    rows = (data / "test" / "logic_test.csv").read_text().splitlines()
    rows[1] = f'"{"Before. " * 300}What, is 1?",1,2,3,4,B'
    (data / "test" / "logic_test.csv").write_text("\n".join(rows) + "\n")
    options = dict(task="mmlu", data=str(data), max_new_tokens=None, num_few_shot=1)
    results, samples = run_ranks(1, run, asked(trained, "mmlu-long", **options))[0]
    assert results["total"] == 27
    assert results["truncated_prompts"] == 1
    (long,) = [sample for sample in samples if sample["id"] == "logic/1"]
    assert (long["shots"], long["tokens"]) == (0, 256)
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    question = f"{'Before. ' * 300}What, is 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    text = f"The following are multiple choice questions (with answers) about logic.\n\n{question}"
    four = [tokenizer(f"{text} {letter}")["input_ids"] for letter in "ABCD"]
    with torch.no_grad():
        logs = model(torch.tensor([four[0][:-1][-256:]])).logits[0, -1].double().log_softmax(-1)
    assert long["log_likelihoods"] == pytest.approx([logs[ids[-1]].item() for ids in four], abs=1e-4)


def test_all_of_mmlu_is_read(setting, data):
    folder = data("mmlu")
    items, examples = mmlu._published(str(folder))
    assert len({item.subject for item in items}) == 57
    tests = (folder / "test").glob("*.csv")
    assert len(items) == sum(len(pandas.read_csv(file, header=None)) for file in tests)
    assert len(examples) == 57 * 5
    options = Options(model="m", task="mmlu", data=str(folder), limit=3)
    task = mmlu.build(options, setting)
    assert len({id_.partition("/")[0] for id_ in task.ids}) == 3
    assert {asked.shots for asked in task._asked.values()} == {5}


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (16, 3), (16, 1), (200, 100), (2, 1)])
def test_windows_score_every_token_but_the_first_once_with_enough_before_it(window, stride):
    ids = np.arange(100, 167, dtype=np.int32)
    windows = loss.cut_into_windows({"input_ids": ids, "labels": ids.copy()}, window, stride)
    scored = []
    for part in windows:
        assert len(part["input_ids"]) <= window
        places = np.flatnonzero(part["labels"] != IGNORED)
        assert (part["labels"][places] == part["input_ids"][places]).all()
        first = part["input_ids"][0] == 100
        assert first or places.min() >= window - stride
        scored += part["input_ids"][places].tolist()
    assert scored == ids[1:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride", "ranks", "batch"), [(64, 32, 1, 1), (64, 63, 2, 5), (256, 100, 1, 3)])
def test_the_loss_of_a_text_is_that_of_a_token_by_token_computation(trained, window, stride, ranks, batch):
    (trained / "text.txt").write_text("There were three apples, and then there were two. Who ate it? " * 9)
    options = dict(task="loss", data=str(trained / "text.txt"), max_new_tokens=None, window=window, stride=stride)
    options |= {"batch_size": batch}
    results, _ = run_ranks(ranks, run, asked(trained, f"loss-{window}-{stride}", **options))[0]
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(trained / "model")((trained / "text.txt").read_text())["input_ids"]
    )
    nats = []
    for place in range(1, len(ids)):
        start = 0
        while start + window <= place:  # the first window that reaches it
            start += stride
        with torch.no_grad():
            logs = model(ids[None, start:place]).logits[0, -1].double().log_softmax(-1)
        nats.append(-logs[ids[place]].item())
    assert results["scored_tokens"] == len(nats)
    assert results["nats_per_token"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


@pytest.mark.slow
def test_of_rows_that_training_reads_the_response_is_scored(trained):
    options = dict(task="loss", data=str(trained / "data.jsonl"), max_new_tokens=None, limit=5)
    results, samples = run_ranks(2, run, asked(trained, "loss-rows", **options))[0]
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    rows = [json.loads(line) for line in (trained / "data.jsonl").read_text().splitlines()[:5]]
    lengths = [len(tokenizer(" " + row["response"])["input_ids"]) + 1 for row in rows]
    assert results["scored_tokens"] == sum(lengths)
    assert len(samples) == 5


@pytest.mark.slow
def test_loss_options_that_do_not_fit_are_refused(trained, setting):
    text = trained / "some.txt"
    text.write_text("words")
    with pytest.raises(ValueError, match="--stride: 8 is not below"):
        loss.build(Options(model="m", task="loss", data=str(text), window=8, stride=8), setting)
    with pytest.raises(ValueError, match="--window: 300 tokens"):
        loss.build(
            Options(model="m", task="loss", data=str(text), window=300), Setting(setting.tokenizer, setting.folder, 256)
        )
    with pytest.raises(ValueError, match="--limit counts rows"):
        loss.build(Options(model="m", task="loss", data=str(text), limit=3), setting)
    (trained / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no token to score"):
        loss.build(Options(model="m", task="loss", data=str(trained / "empty.txt")), setting)
    with pytest.raises(AssertionError, match="--task loss needs --data"):
        run_ranks(1, run, asked(trained, "no-text", task="loss", data=None, max_new_tokens=None))


@pytest.mark.parametrize("name", ["limit", "batch_size", "max_new_tokens", "window", "stride", "num_few_shot"])
def test_numbers_of_options_have_bounds(name):
    tasks = {"window": "loss", "stride": "loss"}
    for value in (-1, 10**18):
        with pytest.raises(ValueError, match=f"--{name}: {value} is no integer from [01] to 1,000,000,000"):
            Options(model="m", task=tasks.get(name, "gsm8k"), **{name: value})


def test_rows_as_people_have_them_are_asked_or_left_out_or_refused(setting, tmp_path):
    """Integer answers, null questions, columns of other names, and errors that name the row."""
    rows = [{"problem": "2+2?", "result": 4}, {"problem": None, "result": 5}, {"problem": "3+3?", "result": "#### 6"}]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "problem", "answer": "result"}
    options = Options(model="m", task="gsm8k", data=str(file), columns=columns)
    task = gsm8k.build(options, setting)
    assert task.ids == ["gsm8k/0", "gsm8k/2"]
    assert [question.key for question in task._questions.values()] == ["4", "6"]
    assert task.notes()[0] == "1 of 3 rows are left out, since question or answer is null: row 2."
    with pytest.raises(ValueError, match=r"--columns: answer is to be 'reply'; train has problem, result"):
        gsm8k.build(Options(model="m", task="gsm8k", data=str(file), columns={"answer": "reply"}), setting)
    for wrong, said in (({"problem": "q", "result": "no"}, "without '####'"), ({"problem": True, "result": 1}, "True")):
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, wrong]))
        with pytest.raises(ValueError, match=f"--data: row 4: .*{said}"):
            gsm8k.build(options, setting)


def test_mmlu_takes_letters_and_numbers_from_any_file(setting, tmp_path):
    row = {"question": "1+1?", "subject": "sums", "choices": ["1", 2, "3", "4"]}
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({**row, "answer": answer}) + "\n" for answer in (1, "B", "2", None)))
    task = mmlu.build(Options(model="m", task="mmlu", data=str(file), num_few_shot=0), setting)
    assert [item.answer for item in task._items.values()] == [1, 1, 2]
    assert next(iter(task._items.values())).choices == ("1", "2", "3", "4")
    assert "row 4" in task.notes()[0]
    file.write_text(json.dumps({**row, "answer": 4}) + "\n")
    with pytest.raises(ValueError, match="row 1: four choices and an answer"):
        mmlu.build(Options(model="m", task="mmlu", data=str(file), num_few_shot=0), setting)


def test_columns_are_named_on_the_command_line():
    given = parse(["--model", "m", "--task", "gsm8k", "--columns", "question=a b", "answer=c=d"])
    assert given.columns == {"question": "a b", "answer": "c=d"}
    assert parse(["--model", "m", "--task", "gsm8k"]).columns == {}
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--task", "gsm8k", "--columns", "question"])


def test_a_copy_of_a_hub_set_with_several_configurations_is_read_as_on_the_hub(setting, tmp_path):
    for name in ("main", "socratic"):
        for split in ("train", "test"):
            row = {"question": f"{name} {split}?", "answer": "#### 1"}
            small_data.write_lines(tmp_path / name / f"{split}.jsonl", [row])
    task = gsm8k.build(Options(model="m", task="gsm8k", data=str(tmp_path)), setting)
    assert "main test?" in _prompts(task)[0]


@pytest.mark.slow
def test_an_added_pad_token_does_not_reach_a_model_that_lacks_it(trained):
    model = trained / "padded"
    shutil.copytree(trained / "model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    while tokenizer.pad_token_id < vocabulary:
        tokenizer.add_special_tokens({"pad_token": f"[PAD{len(tokenizer)}]"})
    tokenizer.save_pretrained(model)
    rows = str(trained / "questions" / "test.jsonl")
    for task, key in (("gsm8k", "accuracy"), ("loss", "nats_per_token")):
        changes = {"task": task, "data": rows, "limit": 5} | ({"max_new_tokens": None} if task == "loss" else {})
        own, _ = run_ranks(1, run, asked(trained, f"own-{task}", **changes))[0]
        padded, _ = run_ranks(1, run, asked(trained, f"padded-{task}", model=str(model), **changes))[0]
        assert padded[key] == pytest.approx(own[key], rel=1e-6)
