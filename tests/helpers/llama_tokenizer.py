"""A tokenizer of Llama's kind, trained on the spot: `▁` for spaces, a BOS before each text, bytes for what is rare."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_tokenizer import CORPUS

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def _spaces() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@cache
def _trained() -> str:
    learning = Tokenizer(models.BPE())
    learning.normalizer = _spaces()
    learning.train_from_iterator(
        (word for text in CORPUS for word in text.split()), trainers.BpeTrainer(vocab_size=120, show_progress=False)
    )
    learned = json.loads(learning.to_str())["model"]
    tokens = [*SPECIAL, *BYTES, *learned["vocab"]]
    tokenizer = Tokenizer(models.BPE(
        {token: number for number, token in enumerate(tokens)}, [tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    ))  # fmt: skip
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = _spaces()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.to_str()


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh one, free to be changed. Its pad token is <unk>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
