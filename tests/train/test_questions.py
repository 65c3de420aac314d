"""What a model is asked: the masked beginning of held-out examples, and nothing of what it should answer."""

import numpy as np

from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.train.questions import Question, questions_of


def example(ids, learned):
    """An example of which the places in `learned` are learned."""
    labels = [token if place in learned else IGNORED for place, token in enumerate(ids)]
    return {"input_ids": np.array(ids, dtype=np.int32), "labels": np.array(labels, dtype=np.int32)}


CHAT = example([5, 6, 7, 8, 9, 10, 11], {2, 3, 5, 6})  # two turns are learned
PLAIN = example([5, 6, 7], {1, 2})
PROMPTED = example([1, 2, 3, 4], {3})


def test_a_prompt_ends_where_the_first_learned_span_begins():
    assert questions_of({"a": Examples.of([CHAT])}, 5, None) == [Question("a", 0, [5, 6], [7, 8])]


def test_plain_text_asks_nothing():
    assert questions_of({"a": Examples.of([PLAIN, PROMPTED])}, 5, None) == [Question("a", 1, [1, 2, 3], [4])]
    assert questions_of({"a": Examples.of([PLAIN])}, 5, None) == []
    assert questions_of({}, 5, None) == []


def test_sources_take_turns():
    found = questions_of({"a": Examples.of([CHAT, PROMPTED, CHAT]), "b": Examples.of([PROMPTED])}, 3, None)
    assert [(one.source, one.number) for one in found] == [("a", 0), ("b", 0), ("a", 1)]


def test_a_prompt_that_leaves_no_room_is_passed_over():
    held_out = {"a": Examples.of([PROMPTED, CHAT])}
    assert [one.number for one in questions_of(held_out, 2, 3)] == [0, 1]
    assert [one.number for one in questions_of(held_out, 2, 2)] == [1]
