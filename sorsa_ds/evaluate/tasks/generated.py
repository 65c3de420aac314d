"""Tasks in which the model writes an answer that is then judged, and how accuracies are told."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from scipy.stats import binomtest
from transformers import PreTrainedTokenizerBase

from sorsa_ds.evaluate.backends.vllm import PROMPTS_A_CALL
from sorsa_ds.evaluate.prompts import prompt_tokens
from sorsa_ds.evaluate.tasks.task import Emit, Engine, Generate, Setting
from sorsa_ds.model.generation import Answer, Prompt, Transformers, batch_prompts
from sorsa_ds.runtime import collectives, digest

TOO_LONG = "too long"
"""The outcome where the prompt leaves the model no room to answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. prompt: the text that the model continues. key: the reference or the tests that judge its answer.

    groups: names such as `level 5`, under which the accuracy is reported too.
    """

    id: str
    prompt: str
    key: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """outcome: `right`, `wrong`, `unparsable` or `timeout`. details: what else the sample's record holds."""

    outcome: str
    details: dict

    @property
    def correct(self) -> bool:
        """Whether the answer counts as right."""
        return self.outcome == "right"


Judge = Callable[[str, str], Judgement]
"""A function from the id of a question and the text of an answer to the judgement."""


class Generated:
    """A task (`task.Task`) of questions: each answer is judged as soon as the model has written it.

    Args:
        new_tokens: the most tokens of an answer.
        judge: a context manager that gives the judge; it is entered on each rank when work begins.
        notes: sentences for the user, printed before work begins.
    """

    def __init__(
        self,
        questions: list[Question],
        setting: Setting,
        new_tokens: int,
        judge: AbstractContextManager[Judge],
        notes: list[str] | None = None,
    ):
        self.ids = [question.id for question in questions]
        assert len(set(self.ids)) == len(self.ids), "ids of questions are not unique"
        self._questions = {question.id: question for question in questions}
        self._prompts = {q.id: _prompt(q, setting, new_tokens) for q in questions}
        self._tokenizer: PreTrainedTokenizerBase = setting.tokenizer
        self._judge_context, self._notes = judge, notes or []
        self._open = ExitStack()
        self._generate: Generate
        self._judge: Judge

    def digest(self) -> str:
        asked = [(p.id, p.token_ids, p.limit, self._questions[p.id].key) for p in self._prompts.values()]
        return digest.of_bytes(repr(asked).encode())

    def notes(self) -> list[str]:
        first = self._questions[self.ids[0]].prompt
        return [*self._notes, f"The first prompt:\n--- prompt ---\n{first}\n--- answer ---"]

    def start(self, engine: Engine) -> None:
        self._generate = engine.generator()
        self._judge = self._open.enter_context(self._judge_context)

    def batches(self, done: Collection[str], size: int) -> list[list[Prompt]]:
        left = [prompt for id_, prompt in self._prompts.items() if id_ not in done]
        askable = [prompt for prompt in left if prompt.limit > 0]
        batches = batch_prompts(askable, *batching(self._generate, askable, size))
        return [[prompt] for prompt in left if prompt.limit <= 0] + batches

    def work(self, batch: list[Prompt], emit: Emit) -> None:
        def receive(prompt: Prompt, answer: Answer) -> None:
            text = continuation(self._tokenizer, prompt.token_ids, answer.token_ids)
            judged = self._judge(prompt.id, text)
            emit(self._record(prompt, judged, text, answer))

        if batch[0].limit > 0:
            self._generate(batch, receive)
        else:
            emit(self._record(batch[0], Judgement(TOO_LONG, {}), "", Answer([], ended=True)))

    def results(self, records: list[dict]) -> dict:
        groups = {group for question in self._questions.values() for group in question.groups}
        of_group = {
            group: [r for r in records if group in self._questions[r["id"]].groups] for group in sorted(groups)
        }  # fmt: skip
        outcomes = Counter(record["outcome"] for record in records)
        return {
            **accuracy(records),
            **{name.replace(" ", "_"): outcomes[name] for name in ("unparsable", "timeout", TOO_LONG)},
            "truncated": sum(not record["ended"] for record in records),
            "mean_answer_tokens": sum(record["tokens"] for record in records) / len(records),
            **({"groups": {group: accuracy(part) for group, part in of_group.items()}} if groups else {}),
        }

    def rows(self, results: dict) -> list[tuple[str, str]]:
        return [
            accuracy_row("accuracy", results),
            ("not right", f"{results['total'] - results['correct']}, of which {results['unparsable']} unparsable, "
                          f"{results['timeout']} took too long, {results['too_long']} had too long a prompt"),
            ("truncated", f"{results['truncated']} answers reached their limit"),
            ("answers", f"{results['mean_answer_tokens']:.0f} tokens in the mean"),
            *(accuracy_row(name, part) for name, part in results.get("groups", {}).items()),
        ]  # fmt: skip

    def close(self) -> None:
        self._open.close()

    def _record(self, prompt: Prompt, judged: Judgement, text: str, answer: Answer) -> dict:
        return {
            "id": prompt.id,
            "correct": judged.correct,
            "outcome": judged.outcome,
            **judged.details,
            "ended": answer.ended,
            "tokens": len(answer.token_ids),
            "text": text,
        }


def batching(generate: Generate, prompts: list[Prompt], size: int) -> tuple[int, bool]:
    """(how many prompts a batch has at most, whether all of a batch must have one length). A collective call.

    Args:
        prompts: all prompts that will be asked.
        size: the batch size that the user wants; vLLM makes batches of its own.
    """
    if not isinstance(generate, Transformers):
        return PROMPTS_A_CALL, False
    if size == 1 or not prompts:
        return size, False
    shortest = min(prompts, key=lambda prompt: len(prompt.token_ids))
    return size, any(collectives.gather_lists([generate.disturbed_by_padding(shortest)]))


def continuation(tokenizer: PreTrainedTokenizerBase, before: list[int], token_ids: list[int]) -> str:
    """The text that `token_ids` add to the text of the tokens before them.

    Decoded alone they could lose their first space, with which tokenizers like SentencePiece begin every text.
    """

    def text_of(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one list of ids gives one text"
        return text

    return text_of(before + token_ids)[len(text_of(before)) :]


def accuracy(records: list[dict]) -> dict:
    """The rate of correct records, its 95 % Wilson interval, and the counts."""
    correct, total = sum(record["correct"] for record in records), len(records)
    low, high = wilson_interval(correct, total)
    return {
        "accuracy": correct / total, "wilson_low": low, "wilson_high": high, "correct": correct, "total": total
    }  # fmt: skip


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate, `correct` successes in `total` trials; (0, 1) for no trial."""
    if total == 0:
        return 0.0, 1.0
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_row(name: str, figures: dict) -> tuple[str, str]:
    """The line of the printed table that tells an accuracy."""
    rate, low, high = (100 * figures[key] for key in ("accuracy", "wilson_low", "wilson_high"))
    return name, f"{rate:.2f} %  ({low:.2f} to {high:.2f}), {figures['correct']} of {figures['total']}"


def _prompt(question: Question, setting: Setting, new_tokens: int) -> Prompt:
    ids = prompt_tokens(question.prompt, setting.tokenizer, setting.bare)
    room = new_tokens if setting.positions is None else min(new_tokens, setting.positions - len(ids))
    return Prompt(question.id, ids, room)
