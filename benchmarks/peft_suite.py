"""PEFT's own tests of its methods, run with SORSA as the method.

    python benchmarks/peft_suite.py                          gets PEFT's source distribution with pip, and runs them
    python benchmarks/peft_suite.py --source FOLDER          takes an unpacked one
    python benchmarks/peft_suite.py -- -k merge              the rest goes to pytest

PEFT's tests are parametrised over tables of configurations. A copy of them is made in which these tables hold SORSA's,
and in which the models of the hub are tiny ones of the same architectures, made on the spot. What is then run is every
test that a SORSA configuration reaches. The last line is one JSON object; exit code 1 where a test fails.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from benchmarks.helpers.common import ROOT, say

SIZES = {"vocab_size": 128, "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 2}
DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, **SIZES,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "tiny_opt": OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                          word_embed_proj_dim=32, max_position_embeddings=64, **SIZES),
    "tiny_with_conv1d": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES),  # PEFT skips "gpt2"
    "tiny_gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **SIZES),
    "tiny_llama": LlamaConfig(**DECODER),
    "tiny_qwen2": Qwen2Config(**DECODER),
}  # fmt: skip
TABLES = {
    "test_config.py": {"ALL_CONFIG_CLASSES": "((SorsaConfig, {}),)"},
    "test_custom_models.py": {
        "TEST_CASES": """[
            ("Vanilla MLP 1 SORSA", "MLP", SorsaConfig, {"target_modules": "lin0", "r": 2}),
            ("Vanilla MLP 2 SORSA", "MLP", SorsaConfig, {"target_modules": ["lin0"], "r": 2}),
            ("Vanilla MLP 3 SORSA", "MLP", SorsaConfig, {"target_modules": ["lin0", "lin1"], "r": 2}),
            ("Vanilla MLP 4 SORSA", "MLP", SorsaConfig, {"target_modules": ["lin0", "lin1"], "r": 4,
                                                         "rank_pattern": {"lin1": 1}}),
            ("Vanilla MLP 5 SORSA", "MLP", SorsaConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"],
                                                         "r": 2}),
            ("Vanilla MLP 6 SORSA", "MLP", SorsaConfig, {"target_modules": "lin0", "r": 2, "sorsa_alpha": 8.0,
                                                         "svd": "exact"}),
            ("Embedding + transformers Conv1D SORSA", "EmbConv1D", SorsaConfig, {"target_modules": ["conv1d"], "r": 1}),
        ]""",
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": """[
            ("SORSA Same", "sorsa", SorsaConfig, {"target_modules": ["lin0"], "r": 2, "init_weights": False},
             {"target_modules": ["lin0"], "r": 2, "init_weights": False}),
            ("SORSA Different", "sorsa", SorsaConfig, {"target_modules": ["lin0"], "r": 2, "init_weights": False},
             {"target_modules": ["lin1"], "r": 2, "init_weights": False}),
        ]""",
    },
    "test_decoder_models.py": {
        "PEFT_DECODER_MODELS_TO_TEST": "SORSA_MODELS", "SMALL_GRID_MODELS": "SORSA_MODELS",
        "ALL_CONFIGS": '[(SorsaConfig, {"task_type": "CAUSAL_LM", "target_modules": None, "r": 2})]',
    },
    "test_quantization.py": {
        "TEST_CASES": """[(SorsaConfig, {"r": 2}), (SorsaConfig, {"r": 2, "target_modules": ["q_proj", "v_proj"]})]""",
    },
}  # fmt: skip
"""File of PEFT's tests -> its tables, each with the source of SORSA's cases."""
CHANGES = {
    "test_custom_models.py": [
        # One test trains with SGD at a rate at which several methods diverge, and knows these by name.
        ("(VBLoRAConfig, RandLoraConfig, UniLoraConfig, OSFConfig)", "(SorsaConfig,)"),
        # Two take each parameter with the adapter's name for trained, but for AdaLoRA's frozen one. Ours are U_0, s_0
        # and V_0.
        ("skip_ranknum and 'ranknum' in name", "'.sorsa_initial.' in name"),
    ],
}
"""File of PEFT's tests -> what is said of single methods there, and what is said in its place."""
NEED_HUB = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")
"""Tests of test_config.py that read a configuration from the hub."""
HEAD = """
import sys
from unittest.mock import MagicMock
diffusers = sys.modules.setdefault("diffusers", MagicMock())  # some of PEFT's tests are of image models
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {{}})
from sorsa_ds.peft import SorsaConfig
SORSA_MODELS = {models!r}
"""
ONLY_SORSA = """
from sorsa_ds.peft import SorsaConfig

def pytest_collection_modifyitems(config, items):
    def is_ours(item):
        values = list(getattr(item, "callspec", None).params.values()) if hasattr(item, "callspec") else []
        return any(value is SorsaConfig or isinstance(value, SorsaConfig) for value in values)
    left = [item for item in items if not is_ours(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if is_ours(item)]
"""


def get_source(folder: Path) -> Path:
    """Get and unpack the source distribution of the installed PEFT; returns its folder."""
    wanted = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", wanted]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    [archive] = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def write_models(folder: Path) -> list[str]:
    """Write the tiny models; returns their folders."""
    for name, config in MODELS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return [str(folder / name) for name in MODELS]


def write_tests(source: Path, folder: Path, models: list[str]) -> list[Path]:
    """Write the copy of PEFT's tests that has SORSA's tables; returns the files that hold tests."""
    for file in source.glob("test*.py"):
        (folder / file.name).write_text(_with_tables(file, models), encoding="utf-8")
    (folder / "__init__.py").touch()
    (folder / "conftest.py").write_text(ONLY_SORSA)
    return [folder / name for name in TABLES]


def _with_tables(file: Path, models: list[str]) -> str:
    """The source of one file of tests, with SORSA's tables in place of its own."""
    tables = dict(TABLES.get(file.name, {}))
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Name) and target.id in tables:
                node.value = ast.parse(tables.pop(target.id).strip(), mode="eval").body  # type: ignore[attr-defined]
        if isinstance(node, ast.ClassDef) and file.name == "test_quantization.py":  # its models are of one size alone
            values = {"model_id": models[0], "expected_layer_count": 4}
            for line in node.body:
                if isinstance(line, ast.Assign) and (name := ast.unparse(line.targets[0])) in values:
                    line.value = ast.Constant(values[name])
    if tables:
        raise ValueError(f"{file} has no table {', '.join(tables)}: this program is for PEFT {version('peft')}")
    text = ast.unparse(tree)
    for old, new in CHANGES.get(file.name, []):
        if old not in text:
            raise ValueError(f"{file} does not have {old!r}: this program is for another version of PEFT")
        text = text.replace(old, new)
    return HEAD.format(models=models) + text


def main() -> int:
    """Run the tests and print what became of them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="PEFT's source distribution, unpacked")
    parser.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="behind --: what pytest gets")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = options.source or get_source(place)
        (place / "suite" / "tests").mkdir(parents=True)
        files = write_tests(source / "tests", place / "suite" / "tests", write_models(place / "models"))
        report = place / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={place / 'suite'}",
                   "-c", "/dev/null", f"--junitxml={report}", *map(str, files), *options.pytest]  # fmt: skip
        command += [f"--deselect=tests/test_config.py::TestPeftConfig::{name}" for name in NEED_HUB]
        say(" ".join(command))
        code = subprocess.run(command, cwd=place / "suite", env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
        results: Counter[str] = Counter(passed=0, failed=0, skipped=0)
        reasons: Counter[str] = Counter()
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            results["skipped" if "skipped" in kinds else "failed" if kinds else "passed"] += 1
            reasons.update(child.get("message") or "" for child in case if child.tag == "skipped")
        for reason, count in reasons.most_common():
            say(f"{count:4} skipped: {reason}")
    say(json.dumps({"benchmark": "peft_suite", "peft": version("peft"), **results}))
    return int(code != 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
