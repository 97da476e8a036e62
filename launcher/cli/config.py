"""The verb config: print the settings of a run or of a command line as a file that `plan` and `train` accept."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher import run_store
from launcher.cli import formatting
from launcher.cli.arguments import COMMON_FLAGS, composing_usage
from launcher.config.command_line import is_run_file
from launcher.config.compose import compose_one, conf_dir
from launcher.config.resume import with_overrides
from launcher.config.run_file import render, values_to_print
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError, LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.security.redaction import redact
from launcher.shell_commands import launcher_command

USAGE = """python -m launcher config RUN [--all] [--json] [overrides]
python -m launcher config [FILE.yaml] [--all] [--json] [overrides]

Print the settings of a run, or of a command line, as a file for `plan FILE.yaml` and `train FILE.yaml`. The file names the
options of the groups that are closest to the settings, and what differs from them. Values that may be secrets are hidden.

  --all         print every setting, and name no options: later versions of the options do not change what the file means
  --json        print every setting as JSON
  --root DIR    folder of the runs (default: runs)"""

FLAGS = ("--all", "--json", "--root")


def run(verb: str, tokens: list[str]) -> int:
    """Print one file."""
    if "--help" in tokens or "-h" in tokens:
        print(composing_usage(USAGE))
        return 0
    has_all, as_json = "--all" in tokens, "--json" in tokens
    root, rest = _split_root([token for token in tokens if token not in ("--all", "--json")])
    words = [token for token in rest if "=" not in token and not token.startswith(("-", "+", "~"))]
    if words and rest[0] == words[0] and not is_run_file(words[0]):
        plan = run_store.load_plan(run_store.find_run(words[0], root))
        config = with_overrides(plan.config, rest[1:], plan.run_name)
        head = _about(plan, config)
    else:
        command = " ".join(launcher_command("plan", *rest).split())
        config, head = compose_one(rest, (*FLAGS, *COMMON_FLAGS)).config, [f"Settings of: {redact(command)}"]
    if as_json:
        print(formatting.as_json(values_to_print(config, conf_dir(), all_settings=True)))
        return 0
    text = render(values_to_print(config, conf_dir(), has_all))
    if not has_all and not _reads_back(text, config):
        # An option of this launcher cannot be the basis of these settings.
        text = render(values_to_print(config, conf_dir(), all_settings=True))
        has_all = True
    print("".join(f"# {' '.join(line.splitlines())}\n" for line in head), text, sep="", end="")
    if has_all and not _reads_back(text, config):
        print("note: not every value can be written into a file; compare with: config --json", file=sys.stderr)
    return 0


def _split_root(tokens: Sequence[str]) -> tuple[Path, list[str]]:
    """Return the value of --root and the remaining words."""
    rest, root = [], "runs"
    words = iter(tokens)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--root":
            rest.append(word)
            continue
        root = value if equals else next(words, "")
        if not root:
            raise ConfigError("--root needs a value", where="command line", remedy="write --root followed by a folder")
    return Path(root), rest


def _about(plan: LaunchPlan, config: RunConfig) -> list[str]:
    lines = [f"Settings of the run {plan.run_name}, planned by launcher {plan.provenance.launcher_version}."]
    lines.append("Relative paths begin at the folder where the run was started: use the file there.")
    if config.run.name is not None:
        lines.append("No two runs have the same name: change run.name to start another run from this file.")
    return lines


def _reads_back(text: str, config: RunConfig) -> bool:
    """Return whether a file with this text results in these settings."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file, suppress(LauncherError):
        file.write(text)
        file.flush()
        return compose_one([file.name]).config == config
    return False
