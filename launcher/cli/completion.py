"""The verb `completion`: print the script with which a shell completes the launcher's command line, and answer its queries.

Answering imports neither Hydra, pydantic nor torch: keys and flags come from a file in the launcher's cache, which is written
once per version of the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import launcher
from launcher import atomic_files
from launcher.cli.arguments import VerbParser
from launcher.cli.main import COMPOSING, VERBS
from launcher.data.cache_dir import cache_root
from launcher.errors import LauncherError

# The words of the command line so far, one per line; the last one is to be completed.
WORDS_VARIABLE = "LAUNCHER_COMPLETION_WORDS"
_ANSWER = "--answer"
# Further verbs that take overrides.
_COMPOSING_TOO = ("resume", "drill", "config", "init")
# In a help text: the usage of a verb that takes a run, or this argument's line.
_TAKES_RUN = re.compile(r"launcher [a-z]+ (?:\[[^]]*\] )*\[?RUN\b|^\s+RUN\b", re.MULTILINE)
_FLAG = re.compile(r"--[a-z][\w-]*")
# Characters without meaning to a shell: a folder name that another user chose must not run as a command when it is completed.
_PLAIN = re.compile(r"[\w./=+@:,~-]+")

_BASH = """\
# bash: eval "$(launcher completion bash)" in ~/.bashrc
_launcher_complete() {
    local line=${COMP_LINE:0:COMP_POINT} words candidates word prefix IFS
    IFS=$' \\t' read -ra words <<< "$line"
    if [[ $line == *[[:space:]] ]]; then words+=(""); fi
    IFS=$'\\n'
    candidates=$(%(variable)s="${words[*]}" "${words[0]}" completion %(answer)s 2>/dev/null)
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
"""
_ZSH = """\
#compdef launcher
# zsh: eval "$(launcher completion zsh)" in ~/.zshrc, after compinit
_launcher() {
    local -a candidates open closed
    candidates=("${(@f)$(%(variable)s="${(F)words[1,CURRENT]}" ${words[1]} completion %(answer)s 2>/dev/null)}")
    open=(${(M)candidates:#*[=.]})
    closed=(${candidates:#*[=.]})
    (( $#open )) && compadd -S '' -- $open
    (( $#closed )) && compadd -- $closed
    (( $#open + $#closed )) || _files
}
compdef _launcher launcher
"""
_FISH = """\
# fish: launcher completion fish > ~/.config/fish/completions/launcher.fish
function __launcher_complete
    set -lx %(variable)s (string join \\n -- (commandline -opc) (commandline -ct) | string collect -N)
    set -l command (commandline -opc)[1]
    $command completion %(answer)s 2>/dev/null
end
complete -c launcher -a '(__launcher_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


@dataclass(frozen=True)
class Vocabulary:
    """What can be completed: settings keys, with values if there is a choice; flags by verb; verbs that take runs."""

    keys: dict[str, list[str]]
    flags: dict[str, list[str]]
    takes_run: list[str]


def run(verb: str, tokens: list[str]) -> int:
    """Print a shell's script, or the candidates for its query."""
    if tokens == [_ANSWER]:
        words = os.environ.get(WORDS_VARIABLE, "").split("\n")
        print("".join(f"{word}\n" for word in complete(words[1:] or [""], vocabulary()) if _PLAIN.fullmatch(word)), end="")
        return 0
    arguments = _parser().parse_args(tokens)
    # This makes the first answer as fast as the others.
    vocabulary()
    print(_SCRIPTS[arguments.shell] % {"variable": WORDS_VARIABLE, "answer": _ANSWER}, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Print the script with which a shell completes commands, group options, settings, flags and names of runs."
    parser = VerbParser(prog="python -m launcher completion", description=about)
    parser.add_argument("shell", choices=tuple(_SCRIPTS), help="the shell that reads the script")
    return parser


def complete(words: Sequence[str], known: Vocabulary) -> list[str]:
    """Return the candidates for the last of the words after the program's name."""
    *before, word = words
    verb = next((w for w in before[:1] if w in VERBS), None)
    if not before and "=" not in word and "." not in word and not word.startswith("-"):
        candidates: Iterable[str] = [*VERBS, *_overrides(word, "train", before, known)] if word else VERBS
    else:
        candidates = _arguments(word, verb or "train", before, known)
    return sorted({candidate for candidate in candidates if candidate.startswith(word) and candidate != word})


def _arguments(word: str, verb: str, before: Sequence[str], known: Vocabulary) -> Iterator[str]:
    if word.startswith("-"):
        yield from known.flags.get(verb, [])
        return
    if verb == "completion":
        yield from _SCRIPTS
    if verb in known.takes_run:
        yield from _runs(before)
    if verb in COMPOSING or verb in _COMPOSING_TOO:
        yield from _overrides(word, verb, before, known)


def _overrides(word: str, verb: str, before: Sequence[str], known: Vocabulary) -> Iterator[str]:
    """Yield groups, sections and keys, or the values of the one before the equals sign."""
    prefix = re.match(r"[+~]{0,2}", word)
    plus = prefix[0] if prefix else ""
    name, equals, _ = word.removeprefix(plus).partition("=")
    groups = _groups(before)
    if equals:
        yield from (f"{plus}{name}={value}" for value in (*groups.get(name, ()), *known.keys.get(name, ())))
        return
    yield from (f"{plus}{group}=" for group in groups)
    sections = dict.fromkeys(key.partition(".")[0] for key in known.keys)
    if "." in name:
        yield from (f"{plus}{key}=" for key in known.keys)
    else:
        yield from (f"{plus}{section}." for section in sections)


def _groups(before: Sequence[str]) -> dict[str, list[str]]:
    """Return the options of each settings group, including those from --config-dir."""
    folders = [_conf_dir(), *(Path(value) for flag, value in pairwise(before) if flag == "--config-dir")]
    options: dict[str, list[str]] = {}
    for folder in folders:
        with suppress(OSError):
            for group in sorted(path for path in folder.expanduser().iterdir() if path.is_dir()):
                options.setdefault(group.name, []).extend(path.stem for path in group.glob("*.yaml"))
    return {group: names for group, names in options.items() if names}


def _conf_dir() -> Path:
    package = Path(launcher.__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def _runs(before: Sequence[str]) -> Iterator[str]:
    """Yield the names of runs that are not on the command line yet."""
    root = next((value for flag, value in pairwise(before) if flag == "--root"), "runs")
    with suppress(OSError):
        for entry in os.scandir(Path(root).expanduser()):
            # In a command, such a word would be a flag or a home directory.
            if entry.name.startswith(("-", "~")) or entry.name in before:
                continue
            if os.path.exists(os.path.join(entry.path, "status.json")):
                yield entry.name


def vocabulary() -> Vocabulary:
    """Return the keys and flags of this launcher version: from the cache, or else built and stored there."""
    try:
        folder = cache_root() / "completion"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, LauncherError):
        # Every answer is slow.
        return _build_vocabulary()
    file = folder / f"{launcher.__version__}-{_newest_source():x}.json"
    with suppress(OSError, ValueError, TypeError):
        return Vocabulary(**json.loads(file.read_text(encoding="utf-8")))
    built = _build_vocabulary()
    with suppress(OSError):
        for outdated in folder.glob("*.json"):
            outdated.unlink(missing_ok=True)
        atomic_files.write_json(file, asdict(built))
    return built


def _newest_source() -> int:
    """Return when the settings or verbs last changed, in nanoseconds: a checkout may change without a new version."""
    package = Path(launcher.__file__).resolve().parent
    folders = (package / "cli", package / "config", package / "config" / "sections")
    return max(entry.stat().st_mtime_ns for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".py"))


def _build_vocabulary() -> Vocabulary:
    from launcher.config.known_settings import settings

    keys = {key: _choices(setting.type) for key, setting in settings().items() if "[]" not in key and "." in key}
    helps = {verb: _help_of(verb) for verb in VERBS}
    flags = {verb: sorted(set(_FLAG.findall(text))) for verb, text in helps.items()}
    takes_run = [verb for verb, text in helps.items() if _TAKES_RUN.search(text)]
    return Vocabulary(keys, flags, takes_run)


def _choices(kind: str) -> list[str]:
    """Return the values of a setting whose type lists them, such as `bf16 | fp16 | fp32`."""
    names = kind.removesuffix(" or null").split(" | ")
    values = [name for name in names if re.fullmatch(r"[\w-]+", name)] if len(names) > 1 else []
    return [*values, *(["null"] if kind.endswith(" or null") else [])]


def _help_of(verb: str) -> str:
    import importlib
    import io
    from contextlib import redirect_stdout

    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        importlib.import_module(f"launcher.cli.{VERBS[verb]}").run(verb, ["--help"])
    return text.getvalue()
