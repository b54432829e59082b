"""Tab completion of commands, options and overrides. Once, or for good in the shell's own file:

bash   eval "$(ich completion bash)"      in ~/.bashrc
zsh    eval "$(ich completion zsh)"       in ~/.zshrc
fish   ich completion fish | source       in ~/.config/fish/config.fish
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from ich.base.entry import Parser, Status
from ich.cli import COMMANDS, HYDRA

# Each asks `ich completion --query LINE`; where that knows nothing, a shell completes files.
SCRIPTS = {
    "bash": r"""
_ich() {
    local IFS=$'\n' i line=${COMP_LINE:0:COMP_POINT}
    # Bash begins a new word at = and : , and replaces that alone.
    local word=${line##* }; word=${word%"$2"}
    COMPREPLY=($("$1" completion --query "$line" 2>/dev/null))
    for i in "${!COMPREPLY[@]}"; do
        [[ ${COMPREPLY[i]} == *[=./]* ]] || COMPREPLY[i]+=' '
        COMPREPLY[i]=${COMPREPLY[i]#"$word"}
    done
}
complete -o default -o nospace -F _ich ich
""",
    "zsh": r"""
_ich() {
    local -a found
    found=(${(f)"$("$words[1]" completion --query "${words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    if (( $#found )); then
        compadd -- ${found:#*[=.\/]*}
        compadd -S '' -- ${(M)found:#*[=.\/]*}
    else
        _files
    fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _ich ich
""",
    "fish": r"""
function __ich_complete
    set -l found (ich completion --query (commandline -cp | string collect) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c ich -f -a '(__ich_complete)'
""",
}


def complete(line: str) -> list[str]:
    """What the last word of a command line may become, as whole words.

    Args:
        line: from the command's name to the cursor.
    """
    _, *words = shlex.split(line)
    word = "" if not words or line[-1].isspace() else words.pop()
    if not words:
        return _starting(word, [*COMMANDS, "--help", "--version"])
    command, *words = words
    if command not in COMMANDS:
        return []
    if command in HYDRA:
        # Imported here: Hydra takes a third of a second, and the other commands have none.
        from ich.launch.command import complete_override, options

        if not word.startswith("-"):
            return complete_override(command, words, word)
        return _starting(word, _flags(options(command)))
    parser: Parser = import_module(f"ich.{command}").parser()
    if word.startswith("-"):
        return _starting(word, _flags(parser))
    return _starting(word, _choices(parser, words))


def _starting(word: str, known: Sequence[str]) -> list[str]:
    return [name for name in known if name.startswith(word)]


def _flags(parser: Parser) -> list[str]:
    named = [a for a in parser._actions if a.help is not argparse.SUPPRESS]
    return [text for action in named for text in action.option_strings if text.startswith("--")]


def _choices(parser: Parser, words: Sequence[str]) -> list[str]:
    """The values of the option that the words end with, or else of an argument."""
    flags = [n for n, word in enumerate(words) if word.startswith("-")]
    given = words[flags[-1] :] if flags else []
    for action in parser._actions:
        if given and given[0] in action.option_strings:
            takes_more = action.nargs == "+" or (action.nargs is None and len(given) == 1)
            return list(action.choices or ()) if takes_more else []
    for action in parser._actions:
        if not action.option_strings and action.choices:
            return list(action.choices)
    return []


def parser() -> Parser:
    """The command's options."""
    parser = Parser("completion", __doc__)
    parser.add_argument("shell", choices=tuple(SCRIPTS), nargs="?")
    parser.add_argument("--query", metavar="LINE", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a shell's script, or what that asks for."""
    asked = parser()
    args = asked.parse_args(argv)
    if args.query is not None:
        try:
            for word in complete(args.query):
                print(word)
        except Exception:
            # Whatever is wrong with half a command: an error has no place in a line being typed.
            return Status.FAILED
    elif args.shell:
        print(SCRIPTS[args.shell].strip())
    else:
        asked.print_help()
    return Status.DONE


if __name__ == "__main__":
    sys.exit(main())
