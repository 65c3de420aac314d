"""The command line: spellings, precedence, error messages, help, and YAML that reads back."""

import re
import time
from pathlib import Path

import pytest

from sorsa_ds.config.command_line import load_settings, to_yaml, with_absolute_paths
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import AdapterConfig, DataConfig, OutputConfig, RegularizerConfig, RunConfig, TrainConfig
from sorsa_ds.train.options import parse

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))


@pytest.fixture
def yaml_file(tmp_path):
    """Write a YAML file and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def error(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(argv)
    return str(caught.value)


@pytest.mark.parametrize("words", [["adapter.rank=64"], ["--adapter.rank", "64"], ["--adapter.rank=64"]])
def test_three_spellings(words):
    assert parse(words).config == RunConfig(adapter=AdapterConfig(rank=64))


def test_an_option_given_twice_is_told():
    assert "--ds_config is given twice: a.json and b.json" in error("--ds_config", "a.json", "--ds_config=b.json")


def test_nothing_said_is_the_defaults():
    invocation = parse(["--local_rank=1"])
    assert invocation.config == RunConfig()
    assert invocation.ds_config.samefile(REPOSITORY / "ds_configs" / "zero3.json")


def test_precedence_defaults_yaml_command_line(yaml_file):
    file = yaml_file("train: {steps: 5, seed: 3}\nadapter:\n  rank: 8\n")
    config = parse(["--config", file, "--train.steps", "7", "train.steps=9"]).config
    assert config == RunConfig(train=TrainConfig(steps=9, seed=3), adapter=AdapterConfig(rank=8))


@pytest.mark.parametrize(
    ("text", "section", "expected"),
    [
        ("output.wandb=off", "output", OutputConfig(wandb="off")),
        ("output.name=12", "output", OutputConfig(name="12")),
        ("output.name=2024-01-31", "output", OutputConfig(name="2024-01-31")),
        ("train.learning_rate=1e-3", "train", TrainConfig(learning_rate=0.001)),
        ("train.steps=null", "train", TrainConfig(steps=None)),
        ("train.adam_betas=[0.8, 0.95]", "train", TrainConfig(adam_betas=(0.8, 0.95))),
        ("train.gradient-checkpointing=true", "train", TrainConfig(gradient_checkpointing=True)),
        ("adapter.targets=[q_proj, v_proj]", "adapter", AdapterConfig(targets=["q_proj", "v_proj"])),
        ("adapter.targets=*.q_proj", "adapter", AdapterConfig(targets="*.q_proj")),
        ("adapter.rank_pattern={mlp.up_proj: 8}", "adapter", AdapterConfig(rank_pattern={"mlp.up_proj": 8})),
        ("data.columns={prompt: q, response: a}", "data", DataConfig(columns={"prompt": "q", "response": "a"})),
        ("regularizer.gamma=0.2*lr", "regularizer", RegularizerConfig(gamma="0.2*lr")),
        ("regularizer.gamma=4e-4", "regularizer", RegularizerConfig(gamma=4e-4)),
        ("data.train_split=train[:100]", "data", DataConfig(train_split="train[:100]")),
    ],
)
def test_values_on_the_command_line_and_in_a_file(yaml_file, text, section, expected):
    assert getattr(parse([text]).config, section) == expected
    name, value = text.split("=", 1)
    value = f"'{value}'" if value.startswith("*") else value  # an alias in YAML
    file = yaml_file(f"{section}:\n  {name.partition('.')[2].replace('-', '_')}: {value}\n")
    assert getattr(parse(["--config", file]).config, section) == expected


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sorsa.rak", "adapter.rank"),
        ("rank", "adapter.rank"),
        ("train.rank", "adapter.rank"),
        ("trian.steps", "train.steps"),
        ("learning_rat", "train.learning_rate"),
        ("regulariser.gama", "regularizer.gamma"),
        ("name", "data.name or output.name"),
        ("ouput.name", "output.name"),
        ("confg", "--config"),
    ],
)
def test_unknown_key_names_the_nearest(key, meant):
    assert f"unknown setting {key}: did you mean {meant}?" in error(f"--{key}", "8")


@pytest.mark.parametrize("text", ["{{ question }} Answer:", "{{ question }}", "{question}", "[INST] {{ q }}", "[a]"])
def test_a_setting_of_plain_text_is_taken_as_it_is_written(text):
    assert load_settings(RunConfig, None, [("data.prompt", text)]).data.prompt == text


def test_a_broken_list_of_another_setting_is_refused():
    with pytest.raises(ValueError, match=r"cannot read the value .* quote names with \* in a list"):
        load_settings(RunConfig, None, [("adapter.targets", "[*.q_proj")])


def test_unknown_key_like_no_other_lists_the_section():
    assert "train.learning_rate" in error("train.lr=1")
    assert "sections" not in error("zzz=1")
    assert "loading, adapter, sorsa, baseline, residual, regularizer" in error("zzz=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter.rank=0", "adapter.rank = 0: must be integer from 1 to 65,536"),
        ("adapter.rank=many", "adapter.rank = 'many': must be integer from 1 to 65,536"),
        ("adapter.rank=1.5", "adapter.rank = 1.5: must be integer from 1 to 65,536"),
        ("adapter.rank=true", "adapter.rank = True: must be integer from 1 to 65,536"),
        ("adapter.rank=", "adapter.rank = None: must be integer from 1 to 65,536"),
        ("adapter.dropout=1", "adapter.dropout = 1: must be number >= 0 and < 1"),
        ("train.learning_rate=.inf", "train.learning_rate = inf: must be number > 0"),
        ("train.warmup_ratio=.nan", "train.warmup_ratio = nan: must be number >= 0 and < 1"),
        ("train.precision=fp16", "train.precision = 'fp16': must be auto | fp32 | mixed | bf16"),
        ("train.steps=0", "train.steps = 0: must be integer from 1 to 1,000,000,000 or null"),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing = 1: must be true or false"),
        ("regularizer.gamma=-1", "regularizer.gamma = -1: must be number from 0 to 1,000,000,000 or text"),
        ("adapter.rank_pattern={q: 0}", "adapter.rank_pattern = {'q': 0}: must be mapping of text to integer from 1"),
        ("regularizer.gamma=1e10*lr", "regularizer.gamma: '1e10*lr' is neither a number from 0 to 1,000,000,000 nor"),
        ("train.steps=1" + "0" * 4000, "0000...: must be integer from 1 to 1,000,000,000 or null"),
        ("train.steps=1" + "0" * 5000, "must be integer from 1"),
        ("adapter.rank_pattern={q: 1, q: 2}", "a key stands twice in this mapping"),
        ("adapter.targets=[" + "[" * 1000, "more than 64 lists and mappings are inside one another"),
        ("adapter.targets=[*q]", "an alias (*name) is not read"),
        ('model="a\\0b"', "model = 'a\\x00b': it holds a NUL character (command line"),
        ('adapter.targets=["a\\0b"]', "it holds a NUL character"),
        ('adapter.rank_pattern={"a\\0b": 3}', "it holds a NUL character"),
        ("output.name=\udcff", "it holds something that is no character"),
        ("sorsa=8", "sorsa is a section, not a setting"),
        ("adapter.targets=[*.q]", "quote names with *"),
    ],
)
def test_bad_value_names_field_value_and_range(text, message):
    assert message in error(text)


def test_all_errors_are_reported_together(yaml_file):
    file = yaml_file("adapter:\n  rank: 0\n  dropuot: 1\n")
    text = error("stray", "--train.seed", "--config", file, "train.steps=-1", "--ds_config", "nowhere.json")
    assert len(text.splitlines()) == 6
    assert "'stray' is not a setting" in text
    assert "--train.seed needs a value" in text
    assert f"adapter.rank = 0: must be integer from 1 to 65,536 ({file}:2)" in text
    assert f"did you mean adapter.dropout? ({file}:3)" in text
    assert "train.steps = -1: must be integer from 1 to 1,000,000,000 or null (command line: train.steps=-1)" in text
    assert "--ds_config nowhere.json: no such file; shipped are ds_configs/stage0.json" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter:\n  rank: [1\ntrain: 3\n", ":3: not valid YAML"),
        ("- sorsa\n", ":1: settings are expected"),
        ("just text", ":1: settings are expected"),
        ("sorsa: 3\n", "sorsa is a section, not a setting"),
        ("adapter:\n  rank: 3\n  rank: 4\n", "adapter.rank is set twice"),
        ("adapter:\n  rank_pattern: {[1]: 2}\n", ":2: not valid YAML"),
        ("output: {name: !!python/name:os.system x}\n", ":1: not valid YAML (a tag (!name) is not read"),
        ("model: !!binary aGVsbG8=\n", ":1: not valid YAML (a tag (!name) is not read"),
        ("train:\n  steps: !!bool 5\n", ":2: not valid YAML (a tag (!name) is not read"),
        ("adapter: &a {rank: 3}\ntrain: *a\n", ":2: not valid YAML (an alias (*name) is not read"),
        ("? [a, b]\n: 3\n", ":1: not valid YAML (a key must be the name of a setting"),
        ("train:\n  steps: 1" + "0" * 5000, ":2: not valid YAML (a number has too many digits"),
        ("model: " + "[" * 100_000, ":1: not valid YAML (more than 64 lists and mappings"),
        ("model:\n" + "".join(f"{' ' * n}- \n" for n in range(200)), "not valid YAML (more than 64 lists and"),
        ("model: x" + " " * 2**20, "is larger than the 1,048,576 bytes that settings may have"),
    ],
)
def test_broken_yaml_names_file_and_line(yaml_file, text, message):
    file = yaml_file(text)
    found = error("--config", file)
    assert message in found
    assert file in found


def test_few_lines_cannot_stand_for_a_billion(yaml_file):
    """An alias bomb: ten levels of ten aliases each; it used to take minutes."""
    levels = [f"x{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    file = yaml_file("\n".join(["x0: &a0 [lol]", *levels]) + "\n")
    began = time.perf_counter()
    assert f"{file}:2: not valid YAML (an alias (*name) is not read" in error("--config", file)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("path", leaves(RunConfig))
def test_every_number_has_a_largest_value_and_a_smallest(path):
    """Whatever is no text: 10^18 and 1e30 are refused, and so are negative numbers and numbers that are none."""
    kind = leaves(RunConfig)[path].type_text
    if "text" not in kind or path == "regularizer.gamma":
        for value in ("1" + "0" * 18, "1e30", "-1", "-1e-3", ".inf", ".nan"):
            assert f"{path} = " in error(f"{path}={value}")


def test_missing_yaml_and_unreadable_yaml(tmp_path):
    assert "--config nowhere.yaml: no such file" in error("--config", "nowhere.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"{binary}: " in error("--config", str(binary))


def test_empty_file_and_empty_section_say_nothing(yaml_file):
    assert parse(["--config", yaml_file("")]).config == RunConfig()
    assert parse(["--config", yaml_file("sorsa:\ntrain:\n")]).config == RunConfig()


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--ds_config", "ds_configs/stage0.json"]).ds_config.is_file()
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "stage0.json").write_text("{}")
    assert parse(["--ds_config=ds_configs/stage0.json"]).ds_config.samefile(tmp_path / "ds_configs" / "stage0.json")


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--local_rank=0", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for path, leaf in leaves(RunConfig).items():
        assert leaf.help, f"{path} has no docstring"
        assert f"--{path} <{leaf.type_text}>" in flat
        assert leaf.help[:60] in flat
    assert "--train.learning_rate <number > 0 and <= 1,000,000,000 or auto> (default 0.0002)" in flat
    assert "deepspeed launch/train.py --ds_config ds_configs/zero3.json" in flat
    assert "--config" in flat


def test_help_is_printed_by_one_rank(capsys):
    with pytest.raises(SystemExit):
        parse(["--local_rank=1", "-h"])
    assert capsys.readouterr().out == ""


UNUSUAL = RunConfig(
    model="1e-3",
    adapter=AdapterConfig(targets=["*.q_proj", "off", "1"], rank_pattern={"no": 3, "a: b": 4, "~": 1}, alpha=1e-30),
    regularizer=RegularizerConfig(gamma="0.2*lr", divide_by_accumulation=False),
    data=DataConfig(
        path="line one\nline two # no comment",
        name="null",
        eval_split=" train[:10] ",
        columns={"prompt": "a: b", "no": "~"},
        prompt="{{ a }}\n\tA: ",
    ),
    train=TrainConfig(learning_rate=1e-8, adam_betas=(0.0, 0.95), gradient_clipping=0, steps=10**6),
    output=OutputConfig(name="12", folder="日本 'q' \"", wandb="off", wandb_project=""),
)


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL])
def test_written_yaml_reads_back(yaml_file, config, comments):
    assert parse(["--config", yaml_file(to_yaml(config, comments))]).config == config


def test_default_recipe_is_the_defaults_with_their_help():
    text = (REPOSITORY / "launch" / "recipes" / "default.yaml").read_text()
    assert text == to_yaml(RunConfig(), comments=True), "out of date: `make recipe` writes it anew"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe):
    config = parse(["--config", str(recipe)]).config
    assert (config == RunConfig()) == (recipe.name == "default.yaml")


SOURCES = ("data.mix", "[{path: a.jsonl, weight: 2}, {path: b/c, weight: 1, columns: {prompt: q}, eval_size: 0}]")


def test_a_mix_is_read_and_written_back(tmp_path):
    config = load_settings(RunConfig, None, [SOURCES])
    assert [(one.path, one.weight, one.eval_size) for one in config.data.mix] == [("a.jsonl", 2, None), ("b/c", 1, 0)]
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(config))
    assert "mix: [{path: a.jsonl, weight: 2.0}, {columns: {prompt: q}, eval_size: 0, path: b/c" in file.read_text()
    assert load_settings(RunConfig, file) == config


def test_files_of_a_mix_get_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(load_settings(RunConfig, None, [SOURCES]))
    assert [one.path for one in config.data.mix] == [str(tmp_path / "a.jsonl"), "b/c"]


@pytest.mark.parametrize("sources", [[], [SOURCES]])
def test_a_chat_template_that_is_a_file_gets_an_absolute_path(tmp_path, monkeypatch, sources):
    (tmp_path / "mine.jinja").touch()
    monkeypatch.chdir(tmp_path)
    config = load_settings(RunConfig, None, [*sources, ("data.chat_template", "mine.jinja")])
    assert with_absolute_paths(config).data.chat_template == str(tmp_path / "mine.jinja")
    named = load_settings(RunConfig, None, [*sources, ("data.chat_template", "qwen3")])
    assert with_absolute_paths(named).data.chat_template == "qwen3"


@pytest.mark.parametrize(
    ("mix", "more", "said"),
    [
        ("[{path: a, wieght: 2}]", [], "wieght of element 1: Unexpected keyword argument"),
        ("[{path: a}, {path: 3}]", [], "path of element 2: Input should be a valid string"),
        ("[{path: a, weight: 0}]", [], "weight of element 1: Input should be greater than 0"),
        ("[a]", [], "data.mix = ['a']: must be list of mapping with path, weight, name"),
        ("[{path: a, weight: 1}, {path: b}]", [], "data.mix: give every source a weight, or none; there is none at b"),
        ("[{path: a}]", [("data.path", "b")], "data.path: with data.mix each source names its own"),
        ("[{path: a}]", [("data.eval_path", "b")], "data.eval_path: with data.mix each source names its own"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_with_the_place(mix, more, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_settings(RunConfig, None, [("data.mix", mix), *more])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sorsa.window_start=3"], "sorsa.window_start=3 goes with sorsa.triplets=window, not leading"),
        (["sorsa.triplets=trailing", "residual.storage=nf4", "residual.iterations=2"], "residual.iterations=2: rounds"),
        (["sorsa.s_space=log", "train.weight_decay=0.1"], "sorsa.s_space=log trains the logarithms of s"),
    ],
)
def test_choices_of_triplets_and_rates_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_settings(RunConfig, None, [tuple(one.split("=")) for one in settings])
