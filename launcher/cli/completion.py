"""The verb `completion`: print the script with which a shell completes the launcher's command line, and answer its queries.

Answering takes a tenth of a second: verbs and flags come from the table of verbs, keys of settings from keys.txt, because the
schema loads slowly.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from launcher.cli.verbs import DEFAULT_ROOT, VERBS, flags_of, rows_of
from launcher.config.command_line import conf_dir, config_dirs, list_options

# Keys of settings and their values, written from the schema by `make settings`.
KEYS = Path(__file__).with_name("keys.txt")
# The words of the command line so far, one per line; the last one is to be completed. With it, the verb prints the candidates.
WORDS_VARIABLE = "LAUNCHER_COMPLETION_WORDS"
# Characters without meaning to a shell: a folder name that another user chose must not run as a command when it is completed.
_PLAIN = re.compile(r"[\w./=+@:,~-]+")

_SCRIPTS = {
    "bash": """\
# bash: eval "$(launcher completion bash)" in ~/.bashrc
_launcher_complete() {
    local line=${COMP_LINE:0:COMP_POINT} words candidates word prefix IFS
    IFS=$' \\t' read -ra words <<< "$line"
    if [[ $line == *[[:space:]] ]]; then words+=(""); fi
    IFS=$'\\n'
    candidates=$(%(variable)s="${words[*]}" "${words[0]}" completion bash 2>/dev/null)
    word=${words[${#words[@]}-1]}
    # bash completes only what follows the last of these characters.
    prefix=${word%%"${word##*[=:]}"}
    COMPREPLY=()
    while IFS= read -r candidate; do
        if [[ -n $candidate ]]; then COMPREPLY+=("${candidate#"$prefix"}"); fi
    done <<< "$candidates"
    if [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace; fi
}
complete -o default -F _launcher_complete launcher
""",
    "zsh": """\
#compdef launcher
# zsh: eval "$(launcher completion zsh)" in ~/.zshrc, after compinit
_launcher() {
    local -a candidates open closed
    candidates=("${(@f)$(%(variable)s="${(F)words[1,CURRENT]}" ${words[1]} completion zsh 2>/dev/null)}")
    open=(${(M)candidates:#*[=.]})
    closed=(${candidates:#*[=.]})
    (( $#open )) && compadd -S '' -- $open
    (( $#closed )) && compadd -- $closed
    (( $#open + $#closed )) || _files
}
compdef _launcher launcher
""",
    "fish": """\
# fish: launcher completion fish > ~/.config/fish/completions/launcher.fish
function __launcher_complete
    set -lx %(variable)s (string join \\n -- (commandline -opc) (commandline -ct) | string collect -N)
    set -l command (commandline -opc)[1]
    $command completion fish 2>/dev/null
end
complete -c launcher -a '(__launcher_complete)'
""",
}


def print_script(arguments: argparse.Namespace) -> int:
    """Print a shell's script, or the candidates for its query."""
    if WORDS_VARIABLE in os.environ:
        words = os.environ[WORDS_VARIABLE].split("\n")
        print("".join(f"{word}\n" for word in complete(words[1:] or [""]) if _PLAIN.fullmatch(word)), end="")
        return 0
    print(_SCRIPTS[arguments.shell] % {"variable": WORDS_VARIABLE}, end="")
    return 0


def complete(words: Sequence[str]) -> list[str]:
    """Return the candidates for the last of the words after the program's name."""
    *before, word = words
    verb = next((w for w in before[:1] if w in VERBS), "train")
    candidates: list[str] = []
    if word.startswith("-"):
        candidates += flags_of(verb)
    elif not before and "=" not in word and "." not in word:
        candidates += [*VERBS, *(_complete_override(word, before) if word else ())]
    else:
        # Values of the flag before the word, or else of positional arguments and settings.
        arguments = [argument for row in rows_of(verb) for argument in row.arguments]
        valued = [one for one in arguments if one.options.get("action", "append") == "append" and {*one.names} & {*before[-1:]}]
        for names, options in valued or [one for one in arguments if not one.names[0].startswith("-")]:
            candidates += options.get("choices", ())
            if "RUN" in options.get("metavar", names[0]):
                candidates += _complete_run(before)
            if names[0] == "overrides":
                candidates += _complete_override(word, before)
    return sorted({candidate for candidate in candidates if candidate.startswith(word) and candidate != word})


def _complete_override(word: str, before: Sequence[str]) -> Iterator[str]:
    """Yield groups, sections and keys, or the values of the one before the equals sign."""
    prefix = re.match(r"[+~]{0,2}", word)
    plus = prefix[0] if prefix else ""
    name, equals, _ = word.removeprefix(plus).partition("=")
    groups, keys = list_options([conf_dir(), *config_dirs(before)]), list_values()
    if equals:
        yield from (f"{plus}{name}={value}" for value in (*groups.get(name, ()), *keys.get(name, ())))
        return
    yield from (f"{plus}{group}=" for group in groups)
    sections = dict.fromkeys(key.partition(".")[0] for key in keys)
    if "." in name:
        yield from (f"{plus}{key}=" for key in keys)
    else:
        yield from (f"{plus}{section}." for section in sections)


def _complete_run(before: Sequence[str]) -> Iterator[str]:
    """Yield the names of runs that are not on the command line yet."""
    root = next((value for flag, value in pairwise(before) if flag == "--root"), DEFAULT_ROOT)
    with suppress(OSError):
        for entry in os.scandir(Path(root).expanduser()):
            # In a command, such a word would be a flag or a home directory.
            if entry.name.startswith(("-", "~")) or entry.name in before:
                continue
            if os.path.exists(os.path.join(entry.path, "plan.json")):
                yield entry.name


def list_values() -> dict[str, list[str]]:
    """Return the keys of all settings, with the values of those that have a choice."""
    lines = KEYS.read_text(encoding="utf-8").splitlines()
    return {key: values for key, *values in map(str.split, lines)}
