"""MT-Bench: conversations of two turns on open questions, judged by another model (Zheng et al. 2023).

Questions and answers are in FastChat's formats, so that its own judge reads them too. Answers of some categories are
drawn with a temperature, as FastChat does; each has a seed of its own, made of the option `--seed`, the question and
the turn, so that it depends on the batch by rounding alone.
"""

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorsa_ds.data.chat import end_rendering
from sorsa_ds.evaluate.backends.chat_service import KEY_VARIABLE, ChatService
from sorsa_ds.evaluate.datasets import DATA_OPTION, Row, drawn_evenly, first_rows, open_data, rows_of
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.prompts import prompt_tokens, render_conversation
from sorsa_ds.evaluate.tasks.generated import batching, continuation
from sorsa_ds.evaluate.tasks.judge import UNPARSABLE, Judge, case_of
from sorsa_ds.evaluate.tasks.task import Emit, Engine, Generate, Setting
from sorsa_ds.model.generation import Answer, Prompt, batch_prompts
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.json_text import finite_json
from sorsa_ds.runtime.waiting import first_of_job
from sorsa_ds.runtime.words import cut, typed

COLUMNS = ("question_id", "category", "turns")
TURNS = 2
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Those of FastChat, by category; answers of the categories that are not named here are greedy."""

SOURCE = "https://github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl"


def build(options: Options, setting: Setting) -> "MtBench":
    """The task of all questions; of a limited number as many of each category.

    Raises:
        ValueError: there is no `--data`, it cannot be read, a row is no question, the tokenizer has no chat template,
            or the judge's address cannot be one.
    """
    if options.data is None or not Path(options.data).expanduser().exists():
        found = "" if options.data is None else f"; there is no {options.data}"
        raise ValueError(f"--task mt_bench needs {DATA_OPTION}, a file of questions or its folder ({SOURCE}){found}")
    rows = first_rows(rows_of(open_data(options.data, None, options.columns), ("train", "test"), COLUMNS), None)
    questions = []
    for number, cells in enumerate(rows, 1):
        row = Row(number, cells)
        with row.named():
            questions.append(_question(cells))
    if len({row["question_id"] for row in questions}) < len(questions):
        raise ValueError(f"{DATA_OPTION}: {options.data} has the same question_id twice")
    questions = drawn_evenly(questions, options.limit, lambda row: row["category"])
    model_id = re.sub(r"[^\w.-]", "-", options.model.rstrip("/").rpartition("/")[2])
    if options.checkpoint is not None:
        model_id += f"-{options.checkpoint}"
    assert setting.output is not None, "the command names the folder of the results"
    judge = None
    if options.judge_url is not None and options.judge_model is not None:
        service = ChatService(options.judge_url, "--judge_url", options.judge_model, options.judge_temperature or 0.0)
        judge = Judge(service, setting.output / "model_judgment", model_id)
    return MtBench(questions, setting, options, model_id, judge)


@dataclass(frozen=True, slots=True)
class _Turn:
    """An answer as it is kept. too_long: the conversation has left no room for it."""

    text: str
    tokens: int
    ended: bool
    too_long: bool = False


class MtBench:
    """A task (`task.Task`) of two-turn conversations. A sample is a conversation, so that its turns stay together.

    Args:
        questions: rows of the data, each with question_id, category, turns and reference.
        model_id: names the model in FastChat's files.
        judge: None: the answers are written, and nobody judges them.
    """

    def __init__(
        self, questions: list[dict[str, Any]], setting: Setting, options: Options, model_id: str, judge: Judge | None
    ):
        self.ids = [f"mt_bench/{row['question_id']}" for row in questions]
        self._questions = dict(zip(self.ids, questions, strict=True))
        self._setting, self._style, self._judge, self._model_id = setting, options.style, judge, model_id
        self._limit, self._seed = options.new_tokens, options.seed or 0
        self._first = {id_: self._prompt(id_, []) for id_ in self.ids}
        self._one_length, self._size = False, options.batch_size
        self._generate: Generate

    def digest(self) -> str:
        asked = [(p, self._questions[p.id]) for p in self._first.values()]
        return digest.of_bytes(repr(asked).encode())

    def notes(self) -> list[str]:
        row = self._questions[self.ids[0]]
        text = render_conversation(self._style, self._setting.tokenizer, row["turns"][0], [])
        judged = [] if self._judge is None else [
            f"The answers will be sent to {self._judge.service.url}, to be judged by {self._judge.service.model}."
        ]  # fmt: skip
        return [*judged, f"The first prompt:\n--- prompt ---\n{text}\n--- answer ---"]

    def start(self, engine: Engine) -> None:
        self._generate = engine.generator()

    def batches(self, done: Collection[str], size: int) -> list[list[Prompt]]:
        left = [prompt for id_, prompt in self._first.items() if id_ not in done]
        askable = [prompt for prompt in left if prompt.limit > 0]
        self._size, self._one_length = batching(self._generate, askable, size)
        too_long = [[prompt] for prompt in left if prompt.limit <= 0]
        return too_long + batch_prompts(askable, self._size, self._one_length)

    def work(self, batch: list[Prompt], emit: Emit) -> None:
        first = self._answer(batch)
        second = self._answer([
            self._prompt(id_, [(self._questions[id_]["turns"][0], turn.text)]) for id_, turn in first.items()
        ])  # fmt: skip
        for id_, turn in first.items():
            turns = [turn, second[id_]]
            emit({
                "id": id_,
                "correct": None,
                "question_id": self._questions[id_]["question_id"],
                "category": self._questions[id_]["category"],
                "turns": [one.text for one in turns],
                "ended": [one.ended for one in turns],
                "too_long": [one.too_long for one in turns],
                "tokens": sum(one.tokens for one in turns),
                "tstamp": time.time(),
            })  # fmt: skip

    def results(self, records: list[dict]) -> dict:
        """The figures. Rank 0 writes FastChat's file and asks the judge; the others wait. A collective call.

        Raises:
            ValueError: the judge fails; all answers, and the judgements that were made, are on the disk.
        """
        judged = first_of_job(lambda: self._finish(records), "judging the answers")
        return {
            "conversations": len(records),
            "truncated": sum(ended is False for record in records for ended in record["ended"]),
            "too_long": sum(sum(record["too_long"]) for record in records),
            "mean_answer_tokens": sum(record["tokens"] for record in records) / (TURNS * len(records)),
            "answers": str(self._answer_file),
            **judged,
        }

    def rows(self, results: dict) -> list[tuple[str, str]]:
        told = [
            ("truncated", f"{results['truncated']} answers reached their limit, {results['too_long']} had no room"),
            ("answers", f"{results['mean_answer_tokens']:.0f} tokens in the mean, in {results['answers']}"),
        ]
        if "judge" not in results:
            how = f"the same command with --judge_url URL --judge_model NAME, and the key in {KEY_VARIABLE}"
            return [*told, ("not judged yet", f"{how}; or FastChat's gen_judgment.py")]
        judge = results["judge"]
        lost = f"{judge['unparsable']} of {judge['judgements']} judgements have no rating from 1 to 10"
        return [
            _score_row("score", results),
            *(_score_row(category, part) for category, part in results["groups"].items()),
            *([("unparsable", f"{lost}: they count in no mean; {judge['file']}")] if judge["unparsable"] else []),
            ("judge", f"{judge['model']} at {judge['url']}, {judge['judgements']} judgements"),
            *told,
        ]

    def close(self) -> None:
        end_rendering()
        if self._judge is not None:
            self._judge.service.close()

    @property
    def _answer_file(self) -> Path:
        assert self._setting.output is not None, "the command names the folder of the results"
        return self._setting.output / "model_answer" / f"{self._model_id}.jsonl"

    def _prompt(self, id_: str, history: Sequence[tuple[str, str]]) -> Prompt:
        """What is asked in the turn after those of the history. Its limit is 0 or less where there is no room."""
        row, setting = self._questions[id_], self._setting
        number = len(history)
        try:
            text = render_conversation(self._style, setting.tokenizer, row["turns"][number], history)
        except ValueError as error:
            raise ValueError(f"--prompt {self._style}, question {id_}, turn {number + 1}: {error}") from error
        ids = prompt_tokens(text, setting.tokenizer, setting.bare)
        room = self._limit if setting.positions is None else min(self._limit, setting.positions - len(ids))
        drawn = digest.of_bytes(f"{self._seed} {row['question_id']} {number}".encode())
        return Prompt(id_, ids, room, TEMPERATURES.get(row["category"], 0.0), int(drawn, 16) % 2**31)

    def _answer(self, prompts: Sequence[Prompt]) -> dict[str, _Turn]:
        """The answers of one turn, by id, in the order of the prompts."""
        made = {prompt.id: _Turn("", 0, True, too_long=True) for prompt in prompts}

        def receive(prompt: Prompt, answer: Answer) -> None:
            text = continuation(self._setting.tokenizer, prompt.token_ids, answer.token_ids)
            made[prompt.id] = _Turn(text.strip(), len(answer.token_ids), answer.ended)

        askable = [prompt for prompt in prompts if prompt.limit > 0]
        for batch in batch_prompts(askable, self._size, self._one_length):
            self._generate(batch, receive)
        return made

    def _finish(self, records: list[dict]) -> dict:
        """Write the answers as FastChat does, and judge them where there is a judge; what results.json has of that."""
        write_text(self._answer_file, "".join(
            finite_json(self._fastchat(record), ensure_ascii=False) + "\n" for record in records
        ))  # fmt: skip
        if self._judge is None:
            return {}
        category = {record["question_id"]: record["category"] for record in records}
        cases = [
            case_of(self._questions[record["id"]], record["turns"], turn)
            for record in records
            for turn in range(1, TURNS + 1)
        ]
        judged = self._judge.judge(cases)
        names = dict.fromkeys(category.values())
        groups = {name: [one for one in judged if category[one["question_id"]] == name] for name in names}
        return {
            **_scores(judged),
            "groups": {name: _scores(part) for name, part in groups.items()},
            "judge": {
                "model": self._judge.service.model, "url": self._judge.service.url, "judgements": len(judged),
                "unparsable": sum(one["score"] == UNPARSABLE for one in judged), "file": typed(self._judge.file),
            },
        }  # fmt: skip

    def _fastchat(self, record: dict) -> dict:
        """A conversation as a line of FastChat's file of answers."""
        said = repr((self._model_id, record["question_id"], record["turns"]))
        return {
            "question_id": record["question_id"],
            "answer_id": digest.of_bytes(said.encode()),
            "model_id": self._model_id,
            "choices": [{"index": 0, "turns": record["turns"]}],
            "tstamp": record["tstamp"],
        }


def _question(cells: dict[str, Any]) -> dict[str, Any]:
    """A question with the fields that it needs, its id as a number where it is one.

    Raises:
        ValueError: a field holds something else.
    """
    id_, category, turns = (cells[name] for name in COLUMNS)
    reference = cells.get("reference")
    if isinstance(id_, bool) or not isinstance(id_, int | str) or id_ == "":
        raise ValueError(f"question_id holds {cut(repr(id_))} where a number or a name is needed")
    if not isinstance(category, str):
        raise ValueError(f"category holds {cut(repr(category))} where a name is needed")
    if not (isinstance(turns, list) and len(turns) == TURNS and all(isinstance(turn, str) and turn for turn in turns)):
        raise ValueError(f"turns holds {cut(repr(turns))} where a list of two texts is needed")
    if not (reference is None or (isinstance(reference, list) and all(isinstance(r, str | None) for r in reference))):
        raise ValueError(f"reference holds {cut(repr(reference))} where a list of texts is needed")
    number = int(id_) if isinstance(id_, str) and id_.isdecimal() else id_
    return {"question_id": number, "category": category, "turns": turns, "reference": reference}


def _scores(judgements: list[dict]) -> dict[str, Any]:
    """Mean ratings of judgements that have one, over all and by turn; None where there is none."""

    def mean(part: list[dict]) -> float | None:
        rated = [one["score"] for one in part if one["score"] != UNPARSABLE]
        return sum(rated) / len(rated) if rated else None

    by_turn = {f"turn_{turn}": mean([o for o in judgements if o["turn"] == turn]) for turn in range(1, TURNS + 1)}
    unparsable = sum(one["score"] == UNPARSABLE for one in judgements)
    return {"score": mean(judgements), **by_turn, "judgements": len(judgements), "unparsable": unparsable}


def _score_row(name: str, figures: dict[str, Any]) -> tuple[str, str]:
    total, first, second = (
        "no rating" if figures[key] is None else f"{figures[key]:.2f}" for key in ("score", "turn_1", "turn_2")
    )
    return name, f"{total} of 10; first turn {first}, second {second}"
