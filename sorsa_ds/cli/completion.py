"""The command `completion`: a script by which a shell completes the words of `sorsa`.

    sorsa completion bash > ~/.local/share/bash-completion/completions/sorsa
    sorsa completion zsh > ~/.sorsa.zsh          # and in ~/.zshrc: source ~/.sorsa.zsh
    sorsa completion fish > ~/.config/fish/completions/sorsa.fish

The script holds all words, so that completing them starts no Python. The words are those that `--help` lists.
"""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Mapping, Sequence

from sorsa_ds.runtime import exit_codes

SHELLS = ("bash", "zsh", "fish")

OPTIONS = {
    "train": "train.options",
    "plan": "plan.options",
    "preview": "preview.options",
    "evaluate": "evaluate.options",
    "chat": "evaluate.chat_options",
    "export": "export.options",
    "runs": "study.runs.options",
    "report": "run.report_options",
    "analyze": "study.analysis.options",
    "compare": "study.compare.options",
    "calibrate": "evaluate.calibrate_options",
    "convert": "config.conversion.options",
}
"""Command -> the module that reads its command line."""

_BASH = """\
_sorsa() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=
    [[ $word != = ]] || {{ before='=' word=; ((COMP_CWORD += 1)); }}
    if [[ $before == = ]]; then
        case ${{COMP_WORDS[COMP_CWORD - 2]}} in
{choices}
        esac
    elif ((COMP_CWORD == 1)); then
        words={commands}
    else
        case ${{COMP_WORDS[1]}} in
{words}
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
    [[ ${{COMPREPLY[*]}} != *= ]] || compopt -o nospace 2>/dev/null
}}
complete -o default -F _sorsa sorsa
"""
"""bash splits words at the sign of equality. What matches no word is completed as a file."""

_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _print(list(sys.argv[1:] if argv is None else argv)))


def _print(words: list[str]) -> None:
    if words in ([], ["-h"], ["--help"]):
        print(__doc__)
        return
    if len(words) != 1 or words[0] not in SHELLS:
        raise ValueError(f"sorsa completion {' '.join(words)}: name one of {', '.join(SHELLS)}")
    print(script(words[0]), end="")


def script(shell: str) -> str:
    """The script for one of SHELLS."""
    from sorsa_ds.cli.sorsa import COMMANDS
    from sorsa_ds.config.fields import leaves
    from sorsa_ds.config.schema import RunConfig

    settings = leaves(RunConfig)
    words = {command: _listed(module, settings) for command, module in OPTIONS.items()}
    choices = {path: some for path, leaf in settings.items() if (some := _choices(leaf.type_text))}
    if shell == "fish":
        return _fish(COMMANDS, words)
    text = _BASH.format(
        commands=_quoted(COMMANDS),
        words="\n".join(f"            {command}) words={_quoted(some)} ;;" for command, some in words.items()),
        choices="\n".join(f"            {path} | --{path}) words={_quoted(some)} ;;" for path, some in choices.items()),
    )  # fmt: skip
    return _ZSH + text if shell == "zsh" else text


def _listed(module: str, settings: Mapping[str, object]) -> list[str]:
    """What a command's `--help` lists, settings as `name=`."""
    parse = importlib.import_module(f"sorsa_ds.{module}").parse
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        parse(["--help"])
    names = re.findall(r"^ +--([\w.]+)", printed.getvalue(), re.MULTILINE)
    return [f"{name}=" if name in settings else f"--{name}" for name in dict.fromkeys([*names, "help"])]


def _choices(type_text: str) -> list[str]:
    """The values that a setting may have, where its type lists them."""
    kinds = type_text.split(" or ")
    return [value for kind in kinds if " | " in kind or kind in ("true", "false") for value in kind.split(" | ")]


def _quoted(words: Sequence[str] | Mapping[str, str]) -> str:
    return f"'{' '.join(words)}'"


def _fish(commands: Mapping[str, str], words: Mapping[str, Sequence[str]]) -> str:
    lines = [f"complete -c sorsa -n __fish_use_subcommand -a {name} -d '{told}'" for name, told in commands.items()]
    for command, some in words.items():
        lines += [f"complete -c sorsa -n '__fish_seen_subcommand_from {command}' -a '{' '.join(some)}'"]
    return "\n".join(lines) + "\n"
