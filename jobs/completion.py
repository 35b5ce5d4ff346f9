"""`capgap completion`: prints a script for bash or zsh that completes commands, flags, settings and run files' names.

The script contains the words, so that completing starts no Python. After an update of capgap it must be made again;
`eval "$(capgap completion bash)"` in `~/.bashrc` does so for each new shell.
"""

from __future__ import annotations

from collections.abc import Sequence

from capgap.jobs.arguments import Parser, one_of, parse
from capgap.jobs.registry import COMMANDS, first_words
from capgap.jobs.settings import all_settings
from capgap.jobs.shipped import shipped_names
from capgap.schemas.base import Record

_BASH = """\
# completion of capgap for bash; for example in ~/.bashrc: eval "$(capgap completion bash)"
_capgap() {
  local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} words= files= reply
  COMPREPLY=()
  if [[ $command == law && $COMP_CWORD -gt 1 ]]; then
    command="law ${COMP_WORDS[2]}"
  fi
  if [[ $COMP_CWORD -eq 1 ]]; then
    words="@FIRST@"
  elif [[ ${COMP_WORDS[1]} == law && $COMP_CWORD -eq 2 ]]; then
    words="@LAW@"
  elif [[ $word == -* ]]; then
    case $command in
@FLAGS@
    esac
  else
    words="@NAMES@" files=yes
  fi
  while IFS= read -r reply; do
    COMPREPLY+=("$reply")
  done < <(compgen -W "$words" -- "$word"; [[ -z $files ]] || compgen -f -- "$word")
  if [[ -n $files ]]; then
    # append a slash to folders, and quote characters that the shell would interpret
    compopt -o filenames 2>/dev/null || true
  fi
}
complete -F _capgap capgap
"""

_ZSH = """\
#compdef capgap
# completion of capgap for zsh; for example in ~/.zshrc, after compinit: eval "$(capgap completion zsh)"
_capgap() {
  local word=${words[CURRENT]} command=${words[2]} found=
  if [[ $command == law && $CURRENT -gt 3 ]]; then
    command="law ${words[3]}"
  fi
  if (( CURRENT == 2 )); then
    found="@FIRST@"
  elif [[ ${words[2]} == law ]] && (( CURRENT == 3 )); then
    found="@LAW@"
  elif [[ $word == -* ]]; then
    case $command in
@FLAGS@
    esac
  else
    found="@NAMES@"
    _files
  fi
  compadd -- ${=found//$'\\n'/ }
}
compdef _capgap capgap
"""


def completion_command(argv: Sequence[str]) -> int:
    """Run `capgap completion`: print the script."""
    shell = parse(completion_parser(), argv)["shell"]
    print(script(shell), end="")
    return 0


def completion_parser() -> Parser:
    """Return the parser of `capgap completion`."""
    parser = Parser("capgap completion", "Print a script that completes commands, flags and settings in a shell.")
    parser.add_argument("shell", metavar="SHELL", type=one_of("bash", "zsh"), help="bash or zsh.")
    return parser


def script(shell: str) -> str:
    """Return the script for `bash` or `zsh`."""
    text = _BASH if shell == "bash" else _ZSH
    variable = "words" if shell == "bash" else "found"
    flags: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        flags.setdefault(" ".join(_flags(command.parser())), []).append(name)
    cases = []
    for words, names in flags.items():
        patterns = "|".join(f'"{name}"' for name in names)
        cases.append(f'      {patterns}) {variable}="{words}" ;;')
    filled = {
        "@FIRST@": " ".join(first_words()),
        "@LAW@": " ".join(name.removeprefix("law ") for name in COMMANDS if name.startswith("law ")),
        "@FLAGS@": "\n".join(cases),
        "@NAMES@": " ".join(shipped_names()),
    }
    for mark, words in filled.items():
        text = text.replace(mark, words)
    return text


def _flags(parser: Parser) -> list[str]:
    own = [flag for action in parser.own_flags for flag in action.option_strings]
    return sorted([*own, "--help", *(f"--{name}" for name in _settings(parser.record))])


def _settings(record: type[Record] | None) -> list[str]:
    return [] if record is None else [setting.name for setting in all_settings(record)]
