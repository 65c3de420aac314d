"""Answers of a model in the middle of its training, greedily, on every ZeRO stage; training goes on as if without."""

import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.generation import Answer, Prompt, Transformers
from sorsa_ds.run.samples import Sample
from sorsa_ds.runtime import collectives
from sorsa_ds.train.questions import Question, texts_of
from sorsa_ds.train.tried_model import eval_mode, model_of


class Sampler:
    """Puts questions to the model of an engine.

    Each rank takes its share of them, one after the other: nothing is padded, on which some models depend. Nothing
    here draws random numbers.

    Args:
        tokens: the most of an answer.
        room: the most of a prompt with its answer, which the model takes; None: any number.
    """

    def __init__(
        self,
        engine: SorsaEngine,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        tokens: int,
        room: int | None,
    ):
        self._engine, self._tokenizer, self.questions = engine, tokenizer, questions
        self._tokens, self._room = tokens, room

    def answers(self, count: int, check: Callable[[], None]) -> list[Sample]:
        """What the model answers to the first `count` questions; the same on every rank. A collective call.

        Args:
            check: called before each question of a rank, by all of them; raises where the run is to stop.

        Raises:
            ValueError: the model cannot answer, because neither it nor its tokenizer names an end token; on every rank.
            Exception: what the model's own code raises where it answers; PeerError on the other ranks then. Where the
                model is gathered, a rank that fails alone leaves the others waiting for it.
        """
        asked, ranks = self.questions[:count], collectives.world_size()
        rounds = math.ceil(len(asked) / ranks)
        mine: list[tuple[int, list[int], bool]] = []
        error: Exception | None = None
        engine, model = self._engine, model_of(self._engine)
        dtype, kept = engine.product_dtype, model.generation_config
        autocast = torch.autocast(engine.device.type, dtype, enabled=dtype is not None)
        try:
            generate = Transformers(model, self._tokenizer, engine.device, synced=self.gathers)
            with eval_mode(engine), engine.kept_sides(), autocast, torch.compiler.set_stance("force_eager"):
                for place in range(collectives.rank(), rounds * ranks, ranks):
                    check()  # a collective call, which a rank that has failed makes too
                    # A rank without a question of its own computes with the others where they gather the model.
                    if error is not None or not (place < len(asked) or self.gathers):
                        continue
                    try:
                        answer = self._answer(generate, asked[place % len(asked)])
                        if place < len(asked):
                            mine.append((place, answer.token_ids, answer.ended))
                    except Exception as caught:
                        error = caught
        finally:
            model.generation_config = kept
        collectives.agree(error, engine.device)
        given = sorted(collectives.gather_lists(mine))
        return [self._sample(asked[place], ids, ended) for place, ids, ended in given]

    @property
    def gathers(self) -> bool:
        """Whether a forward pass is a collective call."""
        return self._engine.zero_optimization_stage() == 3 and collectives.world_size() > 1

    def _answer(self, generate: Transformers, question: Question) -> Answer:
        length = len(question.token_ids)
        limit = self._tokens if self._room is None else min(self._tokens, self._room - length)
        answers: list[Answer] = []
        generate([Prompt("", question.token_ids, limit)], lambda _, answer: answers.append(answer))
        return answers[0]

    def _sample(self, question: Question, ids: list[int], ended: bool) -> Sample:
        prompt, expected = texts_of(question, self._tokenizer)
        answer = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return Sample(question.source, question.number, prompt, expected, answer, ended)
