"""Files as people have them: suffixes in capitals, tabs, links, tables of spreadsheets, types that are not for rows."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.source import load_rows, open_splits

ROW = {"question": "q", "answer": "a"}
LINE = json.dumps(ROW) + "\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(path: Path) -> list[dict]:
    """The training rows of a file or folder."""
    return open_splits(str(path), None, 0)["train"].to_list()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL", LINE), ("a.ndjson", LINE), ("A.Json", LINE), ("A.CSV", "question,answer\nq,a\n"),
        ("a.tsv", "question\tanswer\nq\ta\n"), ("a.TSV", "question\tanswer\nq\ta\n"),
    ],
)  # fmt: skip
def test_a_suffix_is_known_in_capitals_too(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert rows_of(tmp_path / name) == [ROW]


def test_a_folder_is_all_of_its_files_also_behind_links_which_may_lead_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    (folder / "a.jsonl").write_text(LINE)
    (folder / "B.JSONL").write_text(LINE)
    (folder / "c.ndjson").write_text(LINE)
    (elsewhere / "d.jsonl").write_text(LINE)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert rows_of(folder) == [ROW] * 4


def test_empty_columns_of_a_spreadsheet_are_no_columns(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,,\nq,a,, \n")
    assert rows_of(tmp_path / "a.csv") == [ROW]
    (tmp_path / "b.csv").write_text("question,answer,,\nq,a,,\nq,a,,x\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 3: cell 4 stands in a column without a name"):
        rows_of(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text(",question,answer\n0,q,a\n")  # as pandas writes its index
    assert rows_of(tmp_path / "c.csv") == [{"": "0", **ROW}]


def test_a_column_of_a_type_that_makes_no_rows_is_left_out_which_is_said(tmp_path, capsys):
    counts = pyarrow.array([[("m", 1)]], type=pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(
        pyarrow.table({**{k: [v] for k, v in ROW.items()}, "counts": counts}), tmp_path / "a.parquet"
    )
    assert rows_of(tmp_path / "a.parquet") == [ROW]
    assert "Columns whose types cannot be read are left out: counts" in capsys.readouterr().out


def test_two_columns_of_one_name_are_named(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["q"]), pyarrow.array(["a"])], names=["question", "question"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: two columns have the name 'question'"):
        rows_of(tmp_path / "a.parquet")


def test_an_empty_split_beside_another_is_told(tmp_path, capsys):
    splits = {"train": Dataset.from_list([ROW]), "test": Dataset.from_list([ROW]).select([])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == [ROW]
    assert "data.path: test in" in capsys.readouterr().out


def test_what_is_no_data_in_a_folder_is_told(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(LINE)
    for name in ("b.jsonl.zst", "README.md", ".hidden"):
        (tmp_path / name).touch()
    load_rows(DataConfig(path=str(tmp_path), eval_size=0), 0)
    assert "left out: README.md (no kind of data by its suffix), b.jsonl.zst (no kind of" in capsys.readouterr().out


def test_a_file_that_was_replaced_is_read_again_whatever_time_it_bears(tmp_path):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "one"}) + "\n")
    assert rows_of(file)[0]["answer"] == "one"
    before = file.stat()
    other.write_text(json.dumps({"question": "q", "answer": "two"}) + "\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert rows_of(file)[0]["answer"] == "two"


@pytest.mark.parametrize("damaged", ["rows.arrow", "rows_of_files.json"])
def test_a_damaged_cache_of_rows_is_named_with_the_way_to_make_it_again(damaged, tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE)
    rows_of(tmp_path / "a.jsonl")
    for stored in tmp_path.glob(f"cache/sorsa_ds/*/{damaged}"):
        stored.write_bytes(b"{}")
    with pytest.raises(ValueError, match="the rows stored there are damaged .*; remove this folder, and they will be"):
        rows_of(tmp_path / "a.jsonl")
