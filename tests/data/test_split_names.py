"""Which split of a folder a file belongs to, by its name and the names beside it."""

from pathlib import Path

import pytest

from sorsa_ds.data.split_names import splits_of


def splits(*names: str) -> dict[str, list[str]]:
    root = Path("/data")
    found = splits_of(root, [root / name for name in sorted(names)])
    return {split: [str(file.relative_to(root)) for file in files] for split, files in found.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl", "b.jsonl"], {"train": ["a.jsonl", "b.jsonl"]}),
        (["train.jsonl", "more.jsonl"], {"train": ["more.jsonl", "train.jsonl"]}),
        (["unit-test.jsonl", "dev-notes.jsonl"], {"train": ["dev-notes.jsonl", "unit-test.jsonl"]}),
        (["train.csv", "unit-test.csv"], {"train": ["train.csv", "unit-test.csv"]}),
        (["test.csv"], {"test": ["test.csv"]}),
        (["train.csv", "val.csv", "test.csv"],
         {"train": ["train.csv"], "validation": ["val.csv"], "test": ["test.csv"]}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
          "test": ["data/test-00000-of-00001.parquet"]}),
        (["test/math.csv", "train/math.csv"], {"train": ["train/math.csv"], "test": ["test/math.csv"]}),
        (["x_train.csv", "x_test.csv", "y_train.csv", "y_dev.csv"],
         {"train": ["x_train.csv", "y_train.csv"], "validation": ["y_dev.csv"], "test": ["x_test.csv"]}),
        (["train_clean.csv", "test_clean.csv"], {"train": ["train_clean.csv"], "test": ["test_clean.csv"]}),
        (["x_train.csv", "y_test.csv"], {"train": ["x_train.csv", "y_test.csv"]}),
        (["TRAIN.jsonl.gz", "Test.jsonl.gz"], {"train": ["TRAIN.jsonl.gz"], "test": ["Test.jsonl.gz"]}),
        (["dev.csv", "val.csv", "test.csv"], {"validation": ["val.csv"], "test": ["test.csv"], "dev": ["dev.csv"]}),
        (["en/train.csv", "fr/train.csv"], {"train": ["en/train.csv", "fr/train.csv"]}),
    ],
)  # fmt: skip
def test_splits(names, expected):
    assert splits(*names) == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["test.csv", "more.csv"], "test.csv is named as a split that is held out, and more.csv as none"),
        (["main/train.csv", "main/test.csv", "socratic/train.csv", "socratic/test.csv"], "main, socratic; say which"),
        (["data/a/train.csv", "data/a/test.csv", "data/b/train.csv", "data/b/test.csv"], "data/a, data/b; say which"),
    ],
)
def test_what_may_mean_two_things_is_refused(names, said):
    with pytest.raises(ValueError, match=said):
        splits(*names)
