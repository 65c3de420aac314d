"""A conversation with a model on the terminal or through pipes: questions line by line, answers as they come."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from sorsa_ds.config.schema import EMBEDDED_DATA
from sorsa_ds.data.batches import pad_token_id
from sorsa_ds.data.chat_templates import use_template
from sorsa_ds.evaluate.chat_options import ChatOptions
from sorsa_ds.evaluate.models import FoundModel, find_evaluated_model
from sorsa_ds.evaluate.options import Style
from sorsa_ds.evaluate.prompts import prompt_tokens, render_conversation
from sorsa_ds.model.generation import end_tokens
from sorsa_ds.model.language_part import most_positions
from sorsa_ds.model.skeleton import read_config
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.runtime import precision
from sorsa_ds.runtime.console import note, printable, quiet_libraries
from sorsa_ds.runtime.device import device_type, this_device

PROMPTED = ("metamath", "codefeedback", "alpaca", "gsm8k")
"""The formats of data that are learned in the papers' layout."""


def chat(options: ChatOptions) -> None:
    """Answer the lines of stdin until it ends.

    A question that cannot be put is told of, and left out; a new conversation begins then, as by an empty line.

    Raises:
        ValueError: the model or an option does not fit.
    """
    quiet_libraries()
    found = find_evaluated_model(options.model, options.base, options.trust_remote_code, options.checkpoint)
    if options.compare and found.kind == "model":
        raise ValueError(f"--compare sets a run or an adapter beside its base model; {options.model} is a plain model")
    name, why = precision.resolve_inference_dtype(options.dtype, device_type())
    note(why)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    speakers = [Speaker.of(found, dtype, options, "tuned" if options.compare else "")]
    if options.compare:
        base = find_evaluated_model(str(found.folder), None, options.trust_remote_code)
        speakers.insert(0, Speaker.of(base, dtype, options, "base", speakers[0].style))
    torch.manual_seed(options.seed)
    for question in _questions():
        try:
            prompts = [speaker.prompt(question) for speaker in speakers] if question else []
        except ValueError as error:
            note(f"{error}; a new conversation begins here")
            prompts = []
        if not prompts:
            for speaker in speakers:
                speaker.history.clear()
        for speaker, prompt in zip(speakers, prompts, strict=False):
            if speaker.name:
                print(f"[{speaker.name}]", flush=True)
            speaker.answer(question, prompt)


class _Printed(TextStreamer):
    """An answer on the terminal as it comes, with control characters escaped: it is a text of somebody's model."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer."""
        print(printable(text), flush=True, end="\n" if stream_end else "")


def _questions() -> Iterator[str]:
    """The lines of stdin, without their ends; on a terminal behind a prompt."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


@dataclass(slots=True)
class Speaker:
    """A model in a conversation.

    name: what stands above its answers, where there are several. style: how questions are put to it.
    positions: how many tokens it takes at most, None if that is not known. history: questions with their answers.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    style: Style
    positions: int | None
    generation: GenerationConfig
    history: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(
        cls, found: FoundModel, dtype: torch.dtype, options: ChatOptions, name: str, style: Style | None = None
    ) -> "Speaker":
        """Load a model to talk to.

        Args:
            style: None: what the options say, or else the style of the run's data.
        """
        tokenizer = load_tokenizer(found.tokenizer, found.loading)
        if found.chat_template is not None:
            use_template(tokenizer, str(found.chat_template))
        model = found.load(this_device(), dtype)
        ends = end_tokens(model.generation_config, tokenizer)
        sampling = {"temperature": options.temperature} if options.temperature else {}
        generation = GenerationConfig(
            do_sample=bool(sampling),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad_token_id(tokenizer, model.config.get_text_config().vocab_size),
            **sampling,
        )
        model.generation_config = GenerationConfig()  # the model's own may ask for sampling or penalties
        positions = most_positions(read_config(found.folder, found.loading))
        return cls(name, model, tokenizer, style or _style(options, found, tokenizer), positions, generation)

    def prompt(self, question: str) -> list[int]:
        """The tokens that the model continues: the conversation so far with a question.

        Raises:
            ValueError: the tokens are more than the model takes, or the chat template refuses the conversation.
        """
        text = render_conversation(self.style, self.tokenizer, question, self.history)
        prompt = prompt_tokens(text, self.tokenizer, bare=self.style == "chat")
        if self.positions is not None and len(prompt) >= self.positions:
            what = "conversation with this question" if self.history else "question"
            raise ValueError(
                f"the {what} has {len(prompt)} tokens, and the model takes {self.positions} with its answer"
            )
        return prompt

    @torch.inference_mode()
    def answer(self, question: str, prompt: list[int]) -> None:
        """Print the answer to a question, and keep both for the next one.

        Args:
            prompt: what `prompt` gives for the question. The answer is cut where the model takes no more tokens.
        """
        ids, generation = torch.tensor([prompt], device=self.model.device), copy.deepcopy(self.generation)
        if self.positions is not None:
            generation.max_new_tokens = min(generation.max_new_tokens, self.positions - len(prompt))
        made = self.model.generate(  # type: ignore[operator]
            inputs=ids, attention_mask=torch.ones_like(ids), generation_config=generation,
            streamer=_Printed(self.tokenizer, skip_prompt=True, skip_special_tokens=True),  # type: ignore[arg-type]
        )  # fmt: skip
        told = self.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
        self.history.append((question, str(told).strip()))


def _style(options: ChatOptions, found: FoundModel, tokenizer: PreTrainedTokenizerBase) -> Style:
    """How questions are put, which is said: as asked, as in training, or by the chat template if there is one.

    A run whose data has told its format by itself, and is not the generated one, counts as trained on conversations.
    """
    style, why = options.prompt, "--prompt asks for it"
    if style is None:
        data = None if found.run is None else found.run[1].data
        if data is not None and (data.format in PROMPTED or data.path == EMBEDDED_DATA):
            style, why = "papers", "the run's data was laid out so"
        elif tokenizer.chat_template:
            style, why = "chat", "the tokenizer has a chat template"
        else:
            style, why = "plain", "the tokenizer has no chat template"
    note(f"Questions are put in the style {style!r}: {why} (--prompt).")
    return style
