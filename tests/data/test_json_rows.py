"""Rows of JSON files: in every layout, of any size, and with what is wrong named by its line."""

import json

import pytest

from sorsa_ds.data import json_rows as module
from sorsa_ds.data.json_rows import is_one_object, json_rows

ROWS = [{"text": f'é🙂 \\ " {number} ' * number, "n": [number, {"a": -0.7}], "x": None} for number in range(40)]


@pytest.fixture(params=[1, 7, 64, 2**22])
def chunk(request, monkeypatch):
    """Bytes that are read at a time, so that a row and a character end in any place of what is read."""
    monkeypatch.setattr(module, "_CHUNK", request.param)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_is_read_piece_by_piece(indent, mark, chunk, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False) + " \n", encoding="utf-8")
    assert list(json_rows(file)) == ROWS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": "b"},\n{"a": "c"', "line 2: Expecting ',' delimiter"),
        ('[{"a": "b"}\n{"a": "c"}]', "line 2: Expecting ',' delimiter"),
        ('[{"a": "b"}]\n\n[', "line 3: Extra data"),
        ('[{"a": "b"},\n]', "line 2: Expecting value"),
        ('[{"a": "b", "a": "c"}]', 'line 1: "a" is set twice'),
        ('[{"a": Infinity}]', "line 1: Infinity is not a number"),
        ('[{"a": ' + "[" * 70 + "]" * 70 + "}]", "element 1: more than 64 lists"),
    ],
)
def test_what_is_wrong_with_an_array_is_named(content, said, chunk, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json, {said}"):
        list(json_rows(tmp_path / "a.json"))


def test_a_fault_at_the_start_of_a_large_array_is_told_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    (tmp_path / "a.json").write_text('[{"a": b}, ' + '{"a": "c"}, ' * 100_000)
    with (tmp_path / "a.json").open("rb") as stream:
        with pytest.raises(ValueError, match="line 1: Expecting value"):
            list(module._array(tmp_path / "a.json", stream))
        assert stream.tell() < 20_000


@pytest.mark.parametrize("written", ["1.50", "-0", "1e400", "0.1", "12345678901234567890123"])
def test_a_number_is_taken_as_it_is_written(written, tmp_path):
    for name, content in (
        ("a.jsonl", f'{{"a": {written}, "b": true}}'),
        ("a.json", f'[{{"a": {written}, "b": true}}]'),
    ):
        (tmp_path / name).write_text(content)
        assert list(json_rows(tmp_path / name)) == [{"a": written, "b": True}]


def test_one_object_over_several_lines_is_a_row_and_its_fault_has_a_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('\n{\n "a": "b",\n "c": 1.0\n}\n')
    assert list(json_rows(file)) == [{"a": "b", "c": "1.0"}]
    assert not is_one_object(file)  # its first line is blank, as nobody writes descriptions
    file.write_text('{\n "a": "b",\n "c" 1\n}\n')
    with pytest.raises(ValueError, match=r"a\.json, line 3: Expecting ':' delimiter"):
        list(json_rows(file))


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{\n"a": 1\n}', True), ('{"a": 1}\n', False), ('{"a": 1}\n{"a": 2}\n', False), ("[\n{}]", False), ("{\n", False)],
)
def test_descriptions_are_told_from_rows(content, expected, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert is_one_object(tmp_path / "a.json") == expected
