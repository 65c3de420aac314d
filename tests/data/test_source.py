"""Rows from files, folders, the hub and the generator: what is read, what is held out, and what every error says."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import hub_rows, source
from sorsa_ds.data.layout import resolve_format
from sorsa_ds.data.source import load_rows, place_of_row
from sorsa_ds.runtime import hub
from tests.helpers import small_data
from tests.helpers.rendering import render

ROWS = [{"question": f"q{number} é🙂", "answer": f"line\r\n{number}"} for number in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, name: str, rows: list = ROWS) -> Path:
    """The rows in the file format that the name asks for."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if ".json" in name and ".jsonl" not in name else jsonl(rows)
    if name.endswith(".parquet"):
        pandas.DataFrame(rows).to_parquet(file)
    elif ".csv" in name:
        pandas.DataFrame(rows).to_csv(file, index=False)
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def load(path, **settings):
    """(training rows, held-out rows or None) as lists; nothing is held out unless a setting says so."""
    train, held_out = load_rows(DataConfig(path=str(path), **{"eval_size": 0, **settings}), seed=0)
    return train.to_list(), held_out and held_out.to_list()


def error(path, **settings) -> str:
    with pytest.raises(ValueError) as raised:
        load(path, **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.csv", "a.csv.gz", "odd [1] *.jsonl"]
)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    assert load(write(tmp_path, name)) == (ROWS, None)


def test_a_json_file_may_hold_a_row_per_line(tmp_path):
    (tmp_path / "a.json").write_text(jsonl(ROWS))
    assert load(tmp_path / "a.json")[0] == ROWS


def test_a_folders_files_are_one_data_set(tmp_path):
    write(tmp_path, "data/part-1.jsonl", ROWS[:4])
    write(tmp_path, "data/part-2.jsonl.gz", ROWS[4:])
    assert load(tmp_path / "data")[0] == ROWS


def test_a_folders_train_and_test_files_are_splits(tmp_path):
    write(tmp_path, "data/train.jsonl", ROWS[:7])
    write(tmp_path, "data/test.jsonl", ROWS[7:])
    assert load(tmp_path / "data") == (ROWS[:7], None)
    assert load(tmp_path / "data", train_split="train+test")[0] == ROWS
    assert load(tmp_path / "data", eval_split="test", eval_size=2) == (ROWS[:7], ROWS[7:9])


def test_a_changed_file_is_read_again(tmp_path):
    load(write(tmp_path, "a.jsonl"))
    assert load(write(tmp_path, "a.jsonl", ROWS[:3]))[0] == ROWS[:3]


@pytest.mark.parametrize(
    ("spec", "rows"),
    [("train[:3]", ROWS[:3]), ("train[80%:]", ROWS[8:]), ("train[-2:]", ROWS[8:]), ("train[:100000]", ROWS)],
)
def test_slices(spec, rows, tmp_path):
    assert load(write(tmp_path, "a.jsonl"), train_split=spec)[0] == rows


def test_the_last_rows_are_held_out(tmp_path):
    file = write(tmp_path, "a.jsonl")
    assert load(file, eval_size=3) == (ROWS[:7], ROWS[7:])
    assert load(file, eval_size=2, train_split="train[:5]") == (ROWS[:3], ROWS[3:5])


def test_held_out_rows_of_a_split_or_another_file_are_capped(tmp_path):
    file, other = write(tmp_path, "a.jsonl"), write(tmp_path, "b.csv", ROWS[:4])
    assert load(file, train_split="train[:6]", eval_split="train[6:]", eval_size=3) == (ROWS[:6], ROWS[6:9])
    assert load(file, eval_path=str(other), eval_size=3) == (ROWS, ROWS[:3])
    assert load(file, eval_path=str(other), eval_size=30) == (ROWS, ROWS[:4])
    assert load(file, eval_path=str(other), eval_size=0) == (ROWS, None)


def test_held_out_rows_are_never_learned(tmp_path, monkeypatch):
    file = write(tmp_path, "a.jsonl")
    said = "data.eval_split: train[5:] has rows in common with data.train_split (train[:6])"
    assert error(file, train_split="train[:6]", eval_split="train[5:]", eval_size=1).startswith(said)
    monkeypatch.chdir(tmp_path)
    assert "rows in common" in error(file, eval_path="./a.jsonl", eval_size=1)


def test_a_folder_in_gsm8ks_layout(tmp_path):
    folder = small_data.gsm8k(tmp_path / "gsm8k")
    train, held_out = load_rows(DataConfig(path=str(folder), eval_split="test", eval_size=2000), 0)
    assert (len(train), len(held_out)) == (42, 13)
    assert train[0]["answer"].endswith("#### 72")


def test_real_gsm8k(shared_data):
    train, held_out = load_rows(DataConfig(path=str(shared_data / "gsm8k"), eval_split="test", eval_size=2000), 0)
    assert (len(train), len(held_out)) == (7473, 1319)
    assert train[0]["answer"].endswith("#### 72")


@pytest.mark.parametrize("path", ["nowhere.jsonl", "no/where.parquet", "./data", "word-problem", "a/b/c"])
def test_what_is_not_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error(path).startswith(f"data.path: no file or folder {path!r}")
    file = write(tmp_path, "a.jsonl")
    assert error(file, eval_path=path, eval_size=1).startswith(f"data.eval_path: no file or folder {path!r}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "data/a.jsonl"])
def test_an_empty_file(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    path = file.parent if "/" in name else file
    assert error(path) == f"data.path: {file} is empty"


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", " \n\n")])
def test_a_file_without_rows(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert error(tmp_path / name) == f"data.path: {tmp_path / name} is empty"


def test_columns_without_rows(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n")
    assert error(tmp_path / "a.csv") == f"data.path: {tmp_path / 'a.csv'} has no row below its first"


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "1"}\n{"text":\n{"text": "3"}\n', "line 2: Expecting value"),
        ("a.jsonl", b'{"text": "1"}\n\n{"text": "2"} x\n', "line 3: Extra data"),
        ("a.jsonl", b'{"text": "1"}\n{"text": "tr', "line 2: Unterminated string"),
        ("a.jsonl", b'{"text": "1"}\n[1, 2]\n', "line 2: list where an object"),
        ("a.jsonl", b'{"text": "1"}\n{"text": "\xff"}\n', "line 2: 'utf-8' codec can't decode"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "1"}\n\n{"text": 2', "line 3: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "1"},\n{"text": "2"}', "line 2: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "1"},\n{"text": "\xff"}]', "line 2: 'utf-8' codec can't decode"),
        ("a.json", b'[{"text": "1"},\n5]', "element 2: int where an object"),
        ("data/a.jsonl", b'{"text": "1"}\n5 5\n', "line 2: Extra data"),
        ("a.jsonl", b'{"text": "1"}\n{"text": ' + b"[" * 70 + b"\n", "line 2: "),
    ],
)
def test_broken_json_is_named_with_file_and_line(name, content, place, tmp_path):
    write(tmp_path, name).write_bytes(content)
    path = tmp_path / name if "/" not in name else tmp_path / "data"
    assert error(path).startswith(f"data.path: {tmp_path / name}, {place}")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", 'null\n{"text": "1"}\n', "line 1: null where"),
        ("a.jsonl", '\ufeff null {"text": "1"}\n', "line 1: null where"),
        ("a.jsonl", '{"text": "1"}\nnull\n', "line 2: null where"),
        ("a.json", '[ null, {"text": "1"}]', "element 1: null where"),
        ("a.json", '[\n  null,\n {"text": "1"}]', "element 1: null where"),
    ],
)
def test_a_row_of_null_is_named_and_does_not_end_the_process(name, content, place, tmp_path):
    (tmp_path / name).write_text(content)
    assert error(tmp_path / name).startswith(f"data.path: {tmp_path / name}, {place}")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("text\nbook,one\nbook,two\n", "line 2: 2 cells, where the first line names 1 columns"),
        ("query,response\na,b\n\nc,d,e\n", "line 4: 3 cells, where the first line names 2"),
        ("query,response,more\na,b\n", "line 2: 2 cells, where the first line names 3"),
        ('query,response\n"a"b,c\n', "line 2: ',' expected after"),
        ('query,response\na,"b\n', "line 2: unexpected end of data"),
        ("query,response\na,\udcff\n", "can't decode"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_whose_columns_would_move_is_refused_with_its_line(content, place, packed, tmp_path):
    """pandas reads the first two without a word, with every column in the place of its neighbour."""
    file, content = tmp_path / ("a.csv.gz" if packed else "a.csv"), content.encode(errors="surrogateescape")
    file.write_bytes(gzip.compress(content) if packed else content)
    assert error(file).startswith(f"data.path: {file}")
    assert place in error(file)


def test_long_cells_and_blank_lines_of_a_table_are_read(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"long, " * 50_000}"\n\n   \nlast\n')
    assert [len(row["text"]) for row in load(tmp_path / "a.csv")[0]] == [300_000, 4]


def test_a_line_broken_deep_in_a_compressed_file_is_named(tmp_path):
    good = '{"text": "' + "long " * 200 + '"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((good * 30_000 + '{"text": "tr\n' + good).encode(), 1))
    assert error(tmp_path / "a.jsonl.gz").startswith(f"data.path: {tmp_path / 'a.jsonl.gz'}, line 30001: Invalid")


def test_a_damaged_archive(tmp_path):
    file = write(tmp_path, "a.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-20])
    assert error(file).startswith(f"data.path: {file}, cannot be unpacked")


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(ROWS), encoding="utf-8-sig")
    assert load(tmp_path / "a.jsonl")[0] == ROWS


def test_a_broken_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    assert re.match(
        rf"data.path: {re.escape(str(tmp_path))}/a.parquet: Parquet magic bytes", error(tmp_path / "a.parquet")
    )


def test_files_that_cannot_be_read_as_data(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is of no known kind (.json, .jsonl" in error(tmp_path / "notes.txt")
    assert f"the folder {tmp_path} has no data file" in error(tmp_path)
    write(tmp_path, "a.csv")
    write(tmp_path, "b.jsonl")
    assert f"the folder {tmp_path} mixes csv, json" in error(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_split": "test"}, "data.train_split: Unknown split \"test\". Should be one of ['train']"),
        ({"train_split": "train[:"}, "data.train_split: Unrecognized instruction format: train[:"),
        ({"train_split": "train[10:]"}, "data.train_split: train[10:] selects no row; there are train: 10"),
        ({"train_split": "train[5:3]"}, "data.train_split: train[5:3] selects no row; there are train: 10"),
        ({"eval_split": "dev", "eval_size": 1}, 'data.eval_split: Unknown split "dev"'),
        ({"eval_size": 10}, "data.eval_size: nothing is left to train on when 10 of 10 rows are held out"),
    ],
)
def test_settings_that_select_nothing(settings, said, tmp_path):
    assert error(write(tmp_path, "a.jsonl"), **settings).startswith(said)


def test_held_out_data_with_several_splits_needs_one_named(tmp_path):
    file = write(tmp_path, "a.jsonl")
    for name in ("train", "test"):
        write(tmp_path, f"data/{name}.jsonl")
    settings = {"eval_path": str(tmp_path / "data"), "eval_size": 1}
    assert "say which split of data.eval_path to hold out: train, test" in error(file, **settings)
    assert load(file, **settings, eval_split="test")[1] == ROWS[:1]


def test_a_hub_name_goes_to_the_hub(monkeypatch):
    asked = []

    def answer(*arguments):
        asked.append(arguments)
        return DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2]))

    monkeypatch.setattr(hub_rows, "load_dataset", answer)
    monkeypatch.setattr(hub, "can_be_read", lambda *_: True)
    assert load("openai/gsm8k", name="main", eval_split="test", eval_size=5) == (ROWS, ROWS[:2])
    assert asked == [("openai/gsm8k", "main")]


def test_a_row_of_the_hub_is_found_in_its_split(monkeypatch):
    rows = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS))
    monkeypatch.setattr(hub_rows, "load_dataset", lambda *_: rows)
    monkeypatch.setattr(hub, "can_be_read", lambda *_: True)
    config = DataConfig(path="openai/gsm8k", train_split="train[4:]", eval_split="test[2:]", eval_size=3)
    assert (place_of_row(config, 1), place_of_row(config, 1, held_out=True)) == (
        "split train, row 6",
        "split test, row 4",
    )


def test_a_hub_that_fails_is_an_error_that_says_why(monkeypatch):
    def fail(*_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub_rows, "load_dataset", fail)
    monkeypatch.setattr(hub, "can_be_read", lambda *_: True)
    said = error("nobody/nothing", name="main")
    assert said.startswith("data.path: there is no file or folder 'nobody/nothing' here, and reading it from the hub")
    assert said.endswith("failed (data.name: main): Couldn't reach the Hub")


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch):
    offline = []

    def fail(*_):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub_rows, "load_dataset", fail)
    monkeypatch.setattr(hub, "can_be_read", lambda *_: False)
    assert "cannot be reached, and Hugging Face's cache has no copy" in error("nobody/nothing")
    assert (offline, datasets.config.HF_HUB_OFFLINE) == ([True], False)


@pytest.mark.parametrize("named", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("place", ["../secret.jsonl", "https://example.com/evil.jsonl", "hf://datasets/a/b/evil.jsonl"])
def test_a_folder_is_what_lies_in_it_whatever_its_readme_says(named, place, tmp_path):
    write(tmp_path, "secret.jsonl", [{"question": "secret", "answer": "secret"}])
    write(tmp_path, "data/train.jsonl", ROWS[:7])
    write(tmp_path, "data/test.jsonl", ROWS[7:])
    front = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {place}\n"
    (tmp_path / "data" / named).write_text(f"---\n{front}---\n" if named == "README.md" else front)
    assert load(tmp_path / "data") == (ROWS[:7], None)
    assert load(tmp_path / "data", train_split="test")[0] == ROWS[7:]


def test_other_files_in_a_folder_do_not_name_its_splits(tmp_path):
    write(tmp_path, "data [1]/train.jsonl", ROWS[:7])
    write(tmp_path, "data [1]/test.jsonl", ROWS[7:])
    write(tmp_path, "data [1]/.hidden/train.csv")
    (tmp_path / "data [1]" / "instruction.md").write_text("a file that `datasets` takes for a test split")
    assert load(tmp_path / "data [1]") == (ROWS[:7], None)


def test_rows_do_not_open_the_pictures_that_they_name(tmp_path, capsys):
    named = [{"path": str(tmp_path / "secret.png"), "bytes": None}, {"path": "hf://datasets/a/b/c.png", "bytes": None}]
    features = {"text": {"dtype": "string", "_type": "Value"}, "picture": {"_type": "Image"}}
    picture = pyarrow.array(named, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    table = pyarrow.table({"text": ["a", "b"], "picture": picture})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")[0] == [{"text": "a"}, {"text": "b"}]
    assert "Columns of pictures or sound are left out of train: picture" in capsys.readouterr().out


def test_the_embedded_problems():
    train, held_out = load_rows(DataConfig(), seed=0)
    assert (len(train), len(held_out)) == (96, 16)
    rows = [*train, *held_out]
    assert len({row["question"] for row in rows}) == 112
    assert resolve_format("auto", train.column_names).format == "gsm8k"
    for row in rows:
        assert row["answer"].endswith(f"\n#### {row['gold']}")
        assert "Do not include units" not in row["question"]
        assert not re.search(r"\d\.\d{4,}", row["question"] + row["answer"])
        assert 100 < len(row["question"] + row["answer"]) < 1200


def test_the_embedded_problems_follow_the_seed():
    settings = DataConfig()
    again = [load_rows(settings, seed)[0].to_list() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


@pytest.mark.slow
def test_ranks_may_read_at_the_same_time(tmp_path):
    """Processes that start together convert a file under one lock and get the same rows."""
    file = write(tmp_path, "a.jsonl", ROWS * 100)
    program = (
        "import hashlib; from sorsa_ds.config.schema import DataConfig; from sorsa_ds.data.source import load_rows;"
        f"train, held_out = load_rows(DataConfig(path={str(file)!r}), 0);"
        "print(len(train), len(held_out), hashlib.sha256(str(train.to_list()).encode()).hexdigest())"
    )
    environment = {"PATH": "", "HF_DATASETS_CACHE": str(tmp_path / "shared-cache"), "HOME": str(tmp_path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(3)
    ]
    said = {rank.communicate(timeout=300)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(said) == 1
    assert said.pop().startswith("984 16 ")


def test_a_column_of_several_types_stays_and_its_row_is_refused(tmp_path):
    """Such a column was taken for one of pictures, and Alpaca's input was left out of every row."""
    rows = [{"instruction": "Add.", "input": value, "output": "3"} for value in (False, "", "1, 2")]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = source.open_splits(str(path), None, 0)["train"]
    assert read["input"][:] == [False, "", "1, 2"]
    with pytest.raises(ValueError, match="column 'input' holds False where text is needed"):
        render(read[0], "alpaca", None)
