"""Runs with new tokens and modules trained whole: continued, read back, exported, evaluated and analysed."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sorsa_ds import load_adapter
from sorsa_ds.evaluate.models import find_evaluated_model
from sorsa_ds.export.command import Options, export
from sorsa_ds.model.adapter_file import TRAINED, read_description
from sorsa_ds.study.analysis.history import open_history
from tests.helpers import projects
from tests.helpers.architectures import CONFIGS
from tests.helpers.evaluated import asked
from tests.helpers.evaluated import run as evaluated
from tests.helpers.runs import rewound, train, trained
from tests.helpers.worlds import run_ranks

TOKENS = ["<|think|>", "<|done|>"]
ASKED = ['data.new_tokens=["<|think|>","<|done|>"]', "adapter.train_whole=[norm]", "train.weight_decay=0.1"]
CPU = torch.device("cpu")


def make(folder: Path, tied: bool) -> Path:
    """A project whose answers begin and end with new tokens. Where embeddings are tied, they are stored twice."""
    projects.make(folder)
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [{**row, "response": f"<|think|>{row['response']}<|done|>"} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if tied:
        config = deepcopy(CONFIGS["llama"])
        vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings = vocabulary, 256, True
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        file = folder / "model" / "model.safetensors"
        stored = load_file(file)
        save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    return folder


RUNS = {
    "apart": ("zero3", 2, ["analysis.every=3"]),
    "tied": ("zero2", 1, []),
    "packed": ("zero3", 1, ["residual.storage=nf4", "train.max_start_gap=9"]),
    "dora": ("stage0", 1, ["method=dora"]),
    "full": ("zero2", 1, ["method=full", "adapter.train_whole=[]", "adapter.rank=16"]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run by its name in `RUNS`, made when it is asked for."""
    made = {}

    def of(name: str) -> Path:
        if name not in made:
            stage, ranks, more = RUNS[name]
            project = make(tmp_path_factory.mktemp(name), tied=name != "apart")
            asked = [*ASKED, *more, "output.peft_adapter=true"]
            made[name] = train(project, "run", *asked, ranks=ranks, ds=stage)[0]
        return made[name]

    return of


def by_hand(run: Path) -> torch.nn.Module:
    """The trained model in plain transformers: what an adapter holds, put into the base model with more rows."""
    described = read_description(run / "adapter")
    tensors = load_file(run / "adapter" / TRAINED)
    model = AutoModelForCausalLM.from_pretrained(described.base_model, dtype=torch.float32)
    rows = max(described.new_tokens.values()) + 1
    assert rows == len(model.get_input_embeddings().weight) + len(TOKENS)
    model.resize_token_embeddings(rows, mean_resizing=False)
    whole = {name: value for name, value in tensors.items() if name in dict(model.named_parameters())}
    with torch.no_grad():
        for name, value in whole.items():
            model.get_parameter(name).copy_(value)
        if (run / "adapter" / "initial_factors.safetensors").exists():
            initial = load_file(run / "adapter" / "initial_factors.safetensors")
            assert not whole.keys() & initial.keys(), "the base model has these"
            for name in described.layers:
                U, s, V = (tensors[f"{name}.{leaf}"] for leaf in ("U", "s", "V"))
                U_0, s_0, V_0 = (initial[f"{name}.{leaf}"] for leaf in ("U", "s", "V"))
                model.get_submodule(name).weight += (U * s) @ V.T - (U_0 * s_0) @ V_0.T
    return model.eval()


def ids_of(run: Path) -> torch.Tensor:
    """A text with both new tokens, as the run's tokenizer reads it."""
    ids = AutoTokenizer.from_pretrained(run / "adapter" / "tokenizer")("So<|think|>it is 4.<|done|>")["input_ids"]
    assert sum(number in read_description(run / "adapter").new_tokens.values() for number in ids) == 2
    return torch.tensor([ids])


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def gap(model, run: Path, expected) -> float:
    ids = ids_of(run)
    theirs = logits(expected, ids)
    return ((logits(model, ids) - theirs).norm() / theirs.norm()).item()


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(finished):
    run = finished("apart")
    project = run.parent
    copy = rewound(project, run, "again", 4)
    train(project, "again", *ASKED, "analysis.every=3", "--resume=auto")
    ours, theirs = trained(copy), trained(run)
    assert ours.keys() == theirs.keys() and {"model.embed_tokens.weight", "model.norm.weight"} <= ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apart", "tied", "full"])
def test_the_merged_model_is_a_plain_one(finished, tmp_path, name):
    run = finished(name)
    expected = by_hand(run)
    assert gap(load_adapter(run / "adapter"), run, expected) < 1e-5
    export(Options(run, "merged", tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == expected.config.vocab_size
    assert model.config.tie_word_embeddings == (name != "apart")
    assert gap(model, run, expected) < 1e-5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (name == "apart"), "tied embeddings are written once"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("So<|think|>it is 4.<|done|>")["input_ids"] == ids_of(run)[0].tolist()
    assert AutoTokenizer.from_pretrained(run / "adapter" / "tokenizer").chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apart", "tied", "packed", "dora"])
def test_an_adapter_of_peft_holds_the_whole_modules(finished, tmp_path, name):
    """PEFT loads it on the base model that transformers has resized; on what it was trained over, it is exact."""
    run = finished(name)
    described = read_description(run / "adapter")
    export(Options(run, "adapter" if name == "dora" else "lora", tmp_path / "out"))
    base = described.base_model
    if name == "packed":
        export(Options(run, "base", tmp_path / "base"))
        base = tmp_path / "base"
    expected = load_adapter(run / "adapter") if name in ("packed", "dora") else by_hand(run)
    card = (tmp_path / "out" / "README.md").read_text()
    for folder in (tmp_path / "out", run / "adapter"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(max(described.new_tokens.values()) + 1, mean_resizing=False)
        assert f"model.resize_token_embeddings({model.config.vocab_size}, mean_resizing=False)" in card
        model = PeftModel.from_pretrained(model, folder)
        assert gap(model, run, expected) < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("So<|think|>it is 4.<|done|>")["input_ids"] == ids_of(run)[0].tolist()
    if name != "packed":
        found = find_evaluated_model(str(tmp_path / "out"))
        assert found.tokenizer == tmp_path / "out"
        assert gap(found.load(CPU, None), run, expected) < 1e-4


@pytest.mark.slow
def test_the_runs_own_adapter_goes_with_its_tokenizer(finished, tmp_path):
    run = finished("tied")
    export(Options(run, "adapter", tmp_path / "out"))
    assert gap(load_adapter(tmp_path / "out"), run, by_hand(run)) < 1e-5
    for model in (run, tmp_path / "out"):
        found = find_evaluated_model(str(model))
        tokenizer = AutoTokenizer.from_pretrained(found.tokenizer)
        assert tokenizer("So<|think|>it is 4.<|done|>")["input_ids"] == ids_of(run)[0].tolist()
        for dtype in (None, torch.float32):
            assert gap(found.load(CPU, dtype), run, by_hand(run)) < 1e-5


@pytest.mark.slow
def test_an_evaluation_measures_what_the_run_measured(finished, tmp_path):
    run = finished("tied")
    options = asked(run.parent, "loss", model=str(run), task="loss", data=None, dtype="auto", max_new_tokens=None)
    results, _ = run_ranks(1, evaluated, options)[0]
    reported = json.loads((run / "report.json").read_text())
    assert results["nats_per_token"] == pytest.approx(reported["eval_loss_end"], rel=1e-5)
    assert reported["eval_loss_end"] < reported["eval_loss_start"] - 0.1


@pytest.mark.slow
def test_a_run_tells_and_keeps_what_it_trains_whole(finished, tmp_path):
    run = finished("apart")
    report = json.loads((run / "report.json").read_text())
    assert report["trainable_parameters"] == sum(value.numel() for value in trained(run).values())
    described = read_description(run / "adapter")
    assert described.adapter.train_whole == ["norm", "embeddings-and-head"]
    assert list(described.new_tokens) == TOKENS
    export(Options(run, "lora", tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| trained whole | embed_tokens, norm, lm_head: " in card and "| new tokens | `<|think|>` `<|done|>` |" in card
    )
    assert "vLLM takes no adapter with modules_to_save (model.embed_tokens, model.norm, lm_head)" in card
    history = open_history(run)
    assert history.steps == [0, 3, 6]
    assert {target.name for target in history.linears} == described.layers.keys()
    ends = [history.weight(history.linears[0], step) for step in (0, 6)]
    assert not torch.equal(*ends)


@pytest.mark.slow
def test_a_lost_or_foreign_tokenizer_is_refused(finished, tmp_path):
    run = Path(shutil.copytree(finished("tied"), tmp_path / "run"))
    shutil.rmtree(run / "adapter" / "tokenizer")
    base = Path(read_description(run / "adapter").base_model)
    with pytest.raises(ValueError, match="tokenizer"):
        export(Options(run, "lora", tmp_path / "out"))
    (run / "adapter" / "tokenizer").mkdir()
    for path in base.glob("tokenizer*"):
        shutil.copy(path, run / "adapter" / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer is damaged: it does not give '<\|think\|>' the id \d+"):
        export(Options(run, "merged", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
