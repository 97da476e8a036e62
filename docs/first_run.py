"""Update the output of `make run` in README.md.

python docs/first_run.py [OVERRIDES]       train the demonstration (minutes on two cores) and write its output
python docs/first_run.py --from OUTPUT     write an output that was saved before
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- written by docs/first_run.py -->\n", "<!-- end of the output -->\n"
LONGEST_LINE = 100
_INDENT = " " * 4
_ONCE = re.compile(r"\w+: [\d,]+ of [\d,]+ |.*\(once\)$")
_STEP = re.compile(r"step +(\d+)/(\d+) ")
# Show this many steps at the beginning, and the last one.
_NUM_FIRST_STEPS = 2


def run(overrides: Sequence[str]) -> str:
    """Train the demonstration in an empty folder and return the output that a user sees."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        command = [sys.executable, "-m", "launcher", "train", *overrides]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
        return done.stdout.replace(f"{os.path.realpath(folder)}/", "").replace(f"{folder}/", "")


def fold(line: str) -> list[str]:
    """Fold a line into at most two; drop the rest."""
    folded = textwrap.wrap(line, LONGEST_LINE - 4, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
    return folded if len(folded) <= 2 else [folded[0], f"{folded[1]} ..."]


def shown(output: str) -> str:
    """Fold long lines; leave out most steps, and the progress of work done only once per machine."""
    lines: list[str] = []
    for line in output.splitlines():
        step = _STEP.match(line)
        if step and _NUM_FIRST_STEPS < int(step[1]) < int(step[2]):
            line = "..."
        is_repeated = line == "..." and lines[-1:] == ["..."]
        if line.strip() and not _ONCE.match(line) and not is_repeated:
            lines += fold(line)
    return "\n".join(lines) + "\n"


def renewed(readme: str, command: str, output: str) -> str:
    """Return the text of README.md with `command` and its output between the two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}```text\n$ {command}\n{shown(output)}```\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    """Update README.md."""
    is_saved = arguments[:1] == ["--from"]
    overrides = arguments[2:] if is_saved else arguments
    output = Path(arguments[1]).read_text(encoding="utf-8") if is_saved else run(overrides)
    command = f'make run ARGS="{" ".join(overrides)}"' if overrides else "make run"
    README.write_text(renewed(README.read_text(encoding="utf-8"), command, output), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
