"""A user's own prompt: numbers are numbers and print as they are written, and nothing else becomes text unasked."""

import pytest

from sorsa_ds.data.json_rows import json_rows
from sorsa_ds.data.prompt_template import NullColumnError, PromptTemplate
from sorsa_ds.data.stored_rows import read_files
from sorsa_ds.data.written_number import WrittenNumber

SIGN = "{% if label == 1 %}POS{% else %}NEG{% endif %}"


@pytest.fixture(params=["stored", "streamed"])
def cell(request, tmp_path, monkeypatch):
    """Gives the cell that a row of a JSON file has."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def read(written):
        file = tmp_path / "a.jsonl"
        file.write_text(f'{{"label": {written}}}\n')
        if request.param == "streamed":
            return next(iter(json_rows(file)))["label"]
        rows = read_files({"train": [file]})[0]["train"]
        assert type(rows[0]["label"]) is type(rows[:1]["label"][0])
        return rows[:1]["label"][0]

    return read


@pytest.mark.parametrize(
    ("text", "written", "rendered"),
    [
        (SIGN, "1", "POS"),
        (SIGN, "0", "NEG"),
        (SIGN, "1.0", "POS"),
        ("{% if label %}yes{% else %}no{% endif %}", "0", "no"),
        ("{% if label %}yes{% else %}no{% endif %}", "0.0", "no"),
        ("{% if label > 0.5 %}high{% endif %}", "0.75", "high"),
        ("{{ {0: 'no', 1: 'yes'}[label] }}", "1", "yes"),
        ("{{ label + 1 }}", "41", "42"),
        ("{{ label }}", "1.50", "1.50"),
        ("{{ label }}", "-0", "-0"),
        ("{{ label }}", "1E5", "1E5"),
        ("{{ label }}", "12345678901234567890123.10", "12345678901234567890123.10"),
        ("{{ label ~ ' m' }}", "1.50", "1.50 m"),
        ("{{ [label, label] | join(', ') }}", "1.50", "1.50, 1.50"),
        ("{{ '%s' | format(label) }}{{ '{}'.format(label) }}{{ label | trim }}", "1.50", "1.501.501.50"),
        ("{% if label == false %}no{% endif %}", "false", "no"),
        ("{% if label is none %}none{% endif %}", "null", "none"),
    ],
)
def test_numbers_print_as_they_are_written_and_are_numbers(text, written, rendered, cell):
    assert PromptTemplate(text).render({"label": cell(written)}) == rendered


@pytest.mark.parametrize(
    ("text", "written", "said"),
    [
        ("{% if label == '1' %}POS{% endif %}", "1", "number 1 is compared with the text '1'; write it without quotes"),
        ("{% if label in ['1', '2'] %}POS{% endif %}", "1.50", "number 1.50 is compared with the text '1'"),
        ("{{ label / 2 }}", "3", "writes 1.5 where text is needed"),
        ("{{ label }}", "true", "writes True where text is needed"),
        ("{{ label ~ '!' }}", "true", "writes True where text is needed"),
        ("{{ label | upper }}", "false", "writes False where text is needed"),
        ("{{ label | join }}", "[1.50]", "writes 1.5 where text is needed"),
        ("{{ '%s' | format(label) }}", "[1]", r"writes \[1\] where text is needed"),
    ],
)
def test_what_would_be_changed_silently_is_refused(text, written, said, cell):
    with pytest.raises(ValueError, match=said):
        PromptTemplate(text).render({"label": cell(written)})


@pytest.mark.parametrize(
    "text",
    [
        "{{ a }}", "{{ a ~ '!' }}", "{{ a | trim }}", "{{ ['b', a] | join(' ') }}", "{{ '%s' | format(a) }}",
        "{{ '%s' % a }}", "{{ '{}'.format(a) }}", "{{ a | string }}", "{{ [a] | string }}", "{{ a + 1 }}", "{{ -a }}",
        "{% for x in a %}{{ x }}{% endfor %}", "{{ a | length }}", "{{ a.b }}", "{{ a['b'] }}", "{{ a | first }}",
        "{% if a > 1 %}x{% endif %}", "{{ a | int }}", "{{ a | list | join }}", "{{ a | replace('N', 'n') }}",
        "{{ 'x' | replace('x', a) }}", "{{ a | default('x') }}", "{{ a.upper() }}", "{{ [a] | map('upper') | join }}",
        "{{ a | float }}", "{{ a | round }}", "{{ 'None' in a }}", "{{ a or a }}", "{{ a | sum }}", "{{ a | pprint }}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("row", [{"a": None}, {"c": {"a": None}}])
def test_null_is_never_written(text, row):
    with pytest.raises(NullColumnError):
        PromptTemplate(text if "a" in row else "{% set a = c.a %}" + text).render(row)


@pytest.mark.parametrize(
    "test",
    ["a is none", "not a", "a == none", "none == a", "a in [none]", "a is not defined or true", "not a is string"],
)
def test_null_can_be_tested(test):
    rendered = PromptTemplate("{% if " + test + " %}yes{% else %}{{ a }}{% endif %}").render({"a": None})
    assert rendered == "yes"
    assert (
        PromptTemplate("{{ a or 'x' }}{{ a | default('y', true) }}{{ [a] | tojson }}").render({"a": None}) == "xy[null]"
    )


def test_a_column_of_text_and_numbers_keeps_both_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"a": "1.50"}\n' * 1000 + '{"a": 1.50}\n')
    rows = read_files({"train": [tmp_path / "a.jsonl"]})[0]["train"]
    assert [rows[0]["a"], rows[1000]["a"]] == ["1.50", "1.50"]
    assert [type(rows[0]["a"]), type(rows[1000]["a"])] == [str, WrittenNumber]
