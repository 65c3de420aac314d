"""The page of a run: everything in it is text, and it loads nothing."""

import json
from html.parser import HTMLParser

import pytest

from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import DataConfig, RunConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.run.html_report import _SHOWN, report_on, write_page
from sorsa_ds.run.report_options import parse

HOSTILE = '<script src="http://evil/x.js">alert(1)</script><img src=http://evil/y onerror=z>"\'&amp;\u202e'
STEPS = [
    {"step": step, "loss": 3.0 / step, "reg_loss": 0.1, "learning_rate": 1e-3, "tokens_per_second": 10.0}
    for step in (1, 2)
]
EVALUATIONS = [
    {"step": 0, "eval_loss": 4.0, "eval_loss/a<b": 4.25},
    {"step": 2, "eval_loss": 2.0, "eval_loss/a<b": 2.5},
]


class Seen(HTMLParser):
    """Tags, what they refer to, and text, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.references, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """The folder of an unfinished run whose texts would command a browser."""
    folder = tmp_path / "run<b>"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(RunConfig(model="m<i>", data=DataConfig(path="d<u>.jsonl"))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*STEPS, *EVALUATIONS]))
    samples = [
        {
            "step": step,
            "source": "a",
            "number": 0,
            "prompt": f"Q {HOSTILE}",
            "expected": "E",
            "answer": f"A{step}\n{HOSTILE}",
        }
        for step in (0, 2)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return folder


def test_texts_of_others_are_text_and_nothing_is_loaded(run):
    page = write_page(run).read_text()
    seen = Seen(page)
    assert set(seen.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody", "tr",
        "th", "td", "figure", "img", "figcaption",
    }  # fmt: skip
    assert seen.tags.count("img") == 1
    assert all(one.startswith("data:image/png;base64,") for one in seen.references)
    assert "default-src 'none'" in page
    assert "\u202e" not in page
    for text in ("Run run<b>", "m<i>", "d<u>.jsonl", "a<b", "A0\n<script src=", r"\u202e", "It is unfinished."):
        assert text in seen.text, text


def test_a_finished_run_has_its_figures_and_its_best_step(run):
    (run / "report.json").write_text(
        json.dumps({"steps": 2, "planned_steps": 9, "eval_loss_end": 2.0, "trainable_parameters": 1234,
                    "best": {"step": 2, "eval_loss": 2.0, "checkpoint": "step-000002"}})
    )  # fmt: skip
    text = Seen(write_page(run).read_text()).text
    for told in ("Finished after 2 steps of 9: early.", "1,234", "2.0 after step 2, checkpoint step-000002", "2.5"):
        assert told in text, told


def test_the_settings_above_the_curves_are_ones_that_a_run_has(run):
    assert set(_SHOWN) <= leaves(RunConfig).keys()
    text = Seen(write_page(run).read_text()).text
    assert all(path in text for path in _SHOWN if path != "train.global_batch_size"), "one is unset"


def test_a_run_without_a_step_has_a_page_too(run):
    (run / "metrics.jsonl").write_text("")
    (run / "samples.jsonl").unlink()
    assert "No step is made yet." in write_page(run).read_text()


def test_many_answers_are_cut_with_a_word(run):
    line = {"source": "a", "number": 0, "prompt": "Q", "expected": "E"}
    lines = [{**line, "step": step, "answer": f"answer {step}."} for step in range(30)]
    (run / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    text = Seen(write_page(run).read_text()).text
    assert "answer 9." in text and "answer 10." not in text and "answer 20." in text
    assert "10 answers between are left out." in text


def test_the_command_writes_elsewhere_and_refuses_what_is_no_run(run, tmp_path, capsys):
    report_on(parse(["--run", str(run), "--output", str(tmp_path / "new" / "page.html")]))
    assert (tmp_path / "new" / "page.html").exists()
    assert not (run / "report.html").exists()
    with pytest.raises(ValueError, match="--run: .* is not the folder of a run"):
        report_on(parse(["--run", str(tmp_path)]))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [("report.json", "[1]", "report.json is damaged"), ("report.json", "{", "report.json is damaged"),
     ("samples.jsonl", '{"step": 1}\n', "samples.jsonl, line 1: lacks prompt, expected, answer"),
     ("metrics.jsonl", "x\n", "metrics.jsonl, line 1: not JSON")],
)  # fmt: skip
def test_a_damaged_file_is_named(run, file, content, said):
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        write_page(run)
