"""A model that judges the answers of MT-Bench: each answer alone, on a scale from 1 to 10 (Zheng et al. 2023).

There are two roles: one judges by the question alone, the other also has reference answers, where the question is of
mathematics, reasoning or programming and comes with some. Each turn is judged by itself; of the second the judge sees
the whole conversation. The words of the roles are our own, so ratings are comparable among models that were judged
here, and not with published ones.

A judgement is a line of a JSONL file, with the fields that FastChat's table of results is made of. It is in the file as
soon as it is made, so that an interruption loses none.
"""

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorsa_ds.evaluate.backends.chat_service import ChatService
from sorsa_ds.runtime.console import bar
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.json_text import finite_json, parse_json

AT_ONCE = 4
"""Number of answers that the service judges at the same time."""

UNPARSABLE = -1.0
"""The score of a judgement without a rating, as in FastChat, which leaves such judgements out of its means too."""

REFERENCED = ("math", "reasoning", "coding")
"""Categories in which the judge is given the reference answers."""

_ROLES = {
    "general": (
        "You judge the quality of an answer that an assistant gave to a user. Weigh whether the answer is helpful, to "
        "the point, correct, thorough, original where that is asked for, and as detailed as the task needs. A longer "
        "answer is not better for its length, and neither the assistant's tone nor its claims about itself count."
    ),
    "reference": (
        "You judge the quality of an answer that an assistant gave to a user, and above all whether it is right. You "
        "are given a reference answer as well. Work out where the assistant's answer agrees with it and where not, "
        "name each mistake and correct it; an answer that reaches the right result in another way is right. An answer "
        "with a wrong result cannot have a high rating, however well it is written."
    ),
}
_FORM = (
    " First explain your judgement in a few sentences, as impartially as you can. Then end with a line of its own that "
    "has your rating, a number from 1 (worthless) to 10 (excellent), between double square brackets, exactly in this "
    "form: Rating: [[N]]"
)
_SECOND = " The conversation has two turns. Rate only the assistant's answer of the second turn; the first is context."
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]")


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged. turn: 1 or 2. system, user: the messages to the judge. role: names the words of them."""

    question_id: int | str
    turn: int
    role: str
    system: str
    user: str


def case_of(row: dict[str, Any], answers: Sequence[str], turn: int) -> Case:
    """What the judge is asked about one turn.

    Args:
        row: a question of MT-Bench: question_id, category, turns, and reference, which may be None.
        answers: the model's answers in the turns up to this one.
        turn: 1 or 2.
    """
    references = [text or "" for text in row["reference"] or []][:turn]
    role = "reference" if row["category"] in REFERENCED and any(references) else "general"
    parts = []
    for number in range(turn):
        heading = f"turn {number + 1}" if turn > 1 else "the conversation"
        parts.append(f"[Question of {heading}]\n{row['turns'][number]}")
        if role == "reference" and number < len(references) and references[number]:
            parts.append(f"[Reference answer of {heading}]\n{references[number]}")
        parts.append(f"[Assistant's answer of {heading}]\n{answers[number]}\n[End of the assistant's answer]")
    system = _ROLES[role] + (_SECOND if turn > 1 else "") + _FORM
    return Case(row["question_id"], turn, f"sorsa-{role}-turn-{turn}", system, "\n\n".join(parts))


def rating(judgement: str) -> float | None:
    """The rating in a judgement: the last number in double brackets. None where there is none from 1 to 10."""
    found = _RATING.findall(judgement)
    value = float(found[-1]) if found else 0.0
    return value if 1 <= value <= 10 else None


class Judge:
    """Judges answers by asking a service, and keeps the judgements in a file.

    Args:
        folder: where the file is written, under the judge's name.
        model_id: names the judged model in the file.
    """

    def __init__(self, service: ChatService, folder: Path, model_id: str):
        self.service, self._model_id = service, model_id
        name = re.sub(r"[^\w.-]", "-", service.model)
        self.file = folder / f"{name}_single.jsonl"

    def judge(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """The judgements of all cases, in their order. Ratings that are in the file already are not asked for again.

        Raises:
            ValueError: the service fails (`ChatService.answer`), the file holds something else, or no judgement at all
                has a rating. Judgements that were made before are in the file.
        """
        done = {(found["question_id"], found["turn"]): found for found in self._kept(cases)}
        left = [case for case in cases if (case.question_id, case.turn) not in done]
        self._write(done.values())
        progress = bar(len(cases), "judging", "judgement", len(done))
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            with self.file.open("a", encoding="utf-8") as lines:
                for future in as_completed([pool.submit(self._judged, case) for case in left]):
                    made = future.result()
                    lines.write(finite_json(made, ensure_ascii=False) + "\n")
                    lines.flush()
                    done[made["question_id"], made["turn"]] = made
                    progress.update()
        except BaseException:
            self.service.close()  # the other threads would go on with their attempts
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            progress.close()
        ordered = [done[case.question_id, case.turn] for case in cases]
        self._write(ordered)
        if ordered and all(one["score"] == UNPARSABLE for one in ordered):
            raise ValueError(
                f"{self.file}: none of {len(ordered)} judgements by {self.service.model} at {self.service.url} has a "
                f"rating in the form [[N]], N from 1 to 10; the first says {ordered[0]['judgment'][:100]!r}. Name "
                f"another judge, or repeat the command to ask this one again"
            )
        return ordered

    def _judged(self, case: Case) -> dict[str, Any]:
        messages = [{"role": "system", "content": case.system}, {"role": "user", "content": case.user}]
        told = self.service.answer(messages)
        score = rating(told)
        return {
            "question_id": case.question_id, "model": self._model_id, "judge": [self.service.model, case.role],
            "user_prompt": case.user, "judgment": told, "score": UNPARSABLE if score is None else score,
            "turn": case.turn, "tstamp": time.time(),
        }  # fmt: skip

    def _kept(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """The judgements in the file with a rating that are of these cases, of these answers and by this judge."""
        text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        wanted = {(case.question_id, case.turn): case for case in cases}
        kept = []
        for number, line in enumerate(text.split("\n")[:-1], 1):
            try:
                found = parse_json(line)
                case = wanted.get((found["question_id"], found["turn"]))
                same = case is not None and (found["user_prompt"], found["judge"]) == (
                    case.user, [self.service.model, case.role],
                )  # fmt: skip
                if same and isinstance(found["score"], int | float) and found["score"] != UNPARSABLE:
                    kept.append(found)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.file}: line {number} is no judgement ({error}); remove it") from error
        return kept

    def _write(self, judgements: Any) -> None:
        write_text(self.file, "".join(finite_json(one, ensure_ascii=False) + "\n" for one in judgements))
