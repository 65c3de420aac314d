"""JSON of others: every fault is a ValueError in words, and depth has an end."""

import json

import pytest

from sorsa_ds.runtime.json_text import DEEPEST, parse_json, read_json


def nested(depth: int, kind: str) -> str:
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("kind", ["list", "object"])
def test_depth_has_an_end_before_recursion_has(kind):
    assert json.loads(nested(DEEPEST, kind)) == parse_json(nested(DEEPEST, kind))
    for depth in (DEEPEST + 1, 5000, 200_000):
        with pytest.raises(ValueError, match=f"more than {DEEPEST} lists and objects are inside one another"):
            parse_json(nested(depth, kind))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_what_python_takes_for_a_number_and_json_does_not(text):
    with pytest.raises(ValueError, match="is not a number in JSON"):
        parse_json(text)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"1" * 5000, b"\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    for path in (file, tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ValueError, match=f"{path}: cannot be read"):
            read_json(path)


def test_values_are_those_of_json():
    text = '{"a": [1, 2.5, null, true, "x"], "b": {"a": 3}}'
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_a_key_that_stands_twice_is_named():
    with pytest.raises(ValueError, match='"a" is set twice'):
        parse_json('{"b": {"a": 1, "a": 1}}')
