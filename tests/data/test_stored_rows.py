"""Rows as they are stored: exact, whatever the columns of the files, once for all who read them."""

import json

import pytest
from datasets import Dataset

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import data_files, row_table, stored_rows
from sorsa_ds.data.json_rows import json_rows
from sorsa_ds.data.source import load_rows, place_of_row
from sorsa_ds.data.stored_rows import Part, read_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_columns_may_come_and_change_from_row_to_row(tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "ROWS_AT_ONCE", 2)
    rows = [
        {"a": "x"}, {"a": "y"}, {"b": ["-0.7", -0.7, 10**30]}, {"a": True}, {"a": {"c": "z"}, "d": "é"}, {"a": "w"}
    ]  # fmt: skip
    first, second = write(tmp_path, "1.jsonl", rows), write(tmp_path, "2.jsonl", [{"e": "new"}])
    splits, parts = read_files({"train": [first], "test": [second]})
    columns = ("a", "b", "d", "e")
    assert list(splits["train"]) == [{name: row.get(name) for name in columns} for row in rows]
    assert list(splits["test"]) == [{"a": None, "b": None, "d": None, "e": "new"}]
    assert parts == [Part("train", first, 6), Part("test", second, 1)]
    assert [cell["c"] for cell in splits["train"].select([4])["a"]] == ["z"]


def test_numbers_inside_of_lists_and_objects_keep_every_digit(tmp_path):
    """pandas' decoder, which `datasets` uses for JSON, reads -0.7 as -0.7000000000000001."""
    numbers = [-0.7, 0.9319557289737123, 2**64, 1e300]
    file = write(tmp_path, "a.jsonl", [{"a": {"numbers": numbers}}])
    rows = read_files({"train": [file]})[0]["train"]
    assert rows[0]["a"]["numbers"] == numbers
    assert rows.map(lambda row: row)[0]["a"]["numbers"] == numbers


def test_rows_are_converted_once_and_mapped(tmp_path, monkeypatch):
    file = write(tmp_path, "a.jsonl", [{"a": "x"}])
    kept = read_files({"train": [file]})[0]["train"]
    assert kept.cache_files
    monkeypatch.setattr(stored_rows, "_store", None)
    assert read_files({"train": [file]})[0]["train"][:] == kept[:]


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "x"}\n{"a"\n')
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
            read_files({"train": [file]})
    assert [entry for entry in (tmp_path / "cache" / "sorsa_ds").iterdir() if entry.is_dir()] == []


def test_half_a_character_is_named_with_its_row_and_column(tmp_path):
    file = tmp_path / "a.jsonl"
    for cell in ('"\\ud800"', '["\\udc00"]'):
        file.write_text(f'{{"a": "x"}}\n{{"a": {cell}}}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, row 2: column 'a' holds something that is no character"):
            read_files({"train": [file]})


def test_long_rows_are_stored_in_short_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "CHARACTERS_AT_ONCE", 10)
    batches = [len(batch) for batch in row_table._batches(json_rows(write(tmp_path, "a.jsonl", [{"a": "x" * 6}] * 5)))]
    assert batches == [2, 2, 1]


def test_a_row_is_found_in_its_file(tmp_path):
    folder = tmp_path / "data"
    for name, count in (("1", 3), ("2", 2), ("3", 4)):
        write(folder, f"{name}.jsonl", [{"a": f"{name}.{number}"} for number in range(1, count + 1)])
    settings = [
        DataConfig(path=str(folder), eval_size=2),
        DataConfig(path=str(folder), train_split="train[1:6]", eval_split="train[7:]", eval_size=2),
        DataConfig(path=str(folder), train_split="train[:1]", eval_path=str(folder), eval_split="train[4:]"),
    ]
    for config in settings:
        for held_out, rows in enumerate(load_rows(config, 0)):
            for number, row in enumerate(rows):
                file, _, place = row["a"].partition(".")
                assert place_of_row(config, number, bool(held_out)) == f"{folder / file}.jsonl, row {place}"


def test_a_row_of_one_file_is_found_in_it_where_its_own_number_is_another(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"a": str(number)} for number in range(30)])
    held_out = DataConfig(path=str(file), eval_size=10)
    assert place_of_row(held_out, 5, held_out=True) == f"{file}, row 26"
    assert place_of_row(held_out, 5) == ""
    assert place_of_row(DataConfig(path=str(file), train_split="train[20:]", eval_size=0), 5) == f"{file}, row 26"


def test_rows_stored_under_one_path_are_told_by_the_path_that_is_asked_for(tmp_path, capsys):
    write(tmp_path / "data", "a.jsonl", [{"a": "x"}])
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for name in ("data", "link"):
        load_rows(DataConfig(path=str(tmp_path / name), eval_size=0), 0)
        assert f"1 files in {tmp_path / name}: a.jsonl (1)" in capsys.readouterr().out


def test_a_json_file_is_parsed_once_to_tell_whether_it_describes_the_data(tmp_path, monkeypatch):
    parsed = []
    whole = data_files.is_one_object
    monkeypatch.setattr(data_files, "is_one_object", lambda file: parsed.append(file.name) or whole(file))
    write(tmp_path / "data", "rows.json", [{"a": "x"}])
    (tmp_path / "data" / "notes.json").write_text('{\n"a": 1\n}')
    (tmp_path / "data" / ".hidden.json").write_text('{\n"a": 1\n}')
    data_files.check_data(str(tmp_path / "data"), "data.path")
    load_rows(DataConfig(path=str(tmp_path / "data"), eval_size=0), 0)
    assert sorted(parsed) == ["notes.json", "rows.json"]


@pytest.mark.parametrize("where", ["../secret", "/etc/secret", "..", ""])
def test_a_saved_folder_names_no_file_elsewhere(where, tmp_path):
    Dataset.from_list([{"a": "x"}]).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": where}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"data\.path: .*saved, .*not the name of a file|no entry"):
        load_rows(DataConfig(path=str(tmp_path / "saved"), eval_size=0), 0)


def test_a_folder_says_what_was_read(tmp_path, capsys):
    folder = tmp_path / "data"
    write(folder, "train.jsonl", [{"a": "x"}] * 3)
    write(folder, "more.jsonl", [{"a": "x"}] * 5)
    (folder / "notes.json").write_text('{\n"a": 1\n}')
    load_rows(DataConfig(path=str(folder), eval_size=0), 0)
    assert capsys.readouterr().out.splitlines() == [
        f"data.path: train is 8 rows of 2 files in {folder}: more.jsonl (5), train.jsonl (3)",
        "data.path: left out: notes.json (one object over several lines)",
    ]


def test_a_row_of_a_folder_is_refused_with_its_file(tmp_path):
    from sorsa_ds.data.examples import load_examples
    from tests.helpers.chat_tokenizer import chat_tokenizer

    write(tmp_path / "data", "1.jsonl", [{"text": "x"}] * 3)
    write(tmp_path / "data", "2.jsonl", [{"text": "x"}, {"text": False}])
    with pytest.raises(ValueError, match=r"row 5 \(.*data/2\.jsonl, row 2\): column 'text' holds False"):
        load_examples(DataConfig(path=str(tmp_path / "data"), eval_size=0), chat_tokenizer(), 0)
