"""Renew the output of `make run` in README.md.

python docs/first_run.py              train the demonstration (about three minutes on two cores) and write its output
python docs/first_run.py OUTPUT       write an output that was saved before
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
# Where the values of the plan begin.
_INDENT = " " * 11


def run() -> str:
    """Train the demonstration in an empty folder and return what a person sees."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        command = [sys.executable, "-m", "launcher"]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
        return done.stdout.replace(f"{os.path.realpath(folder)}/", "").replace(f"{folder}/", "")


def shown(output: str) -> str:
    """Fold long lines, and leave out the progress of what happens once on a machine."""
    lines = [line for line in output.splitlines() if line.strip() and not re.match(r"\w+: [\d,]+ of [\d,]+ |.*\(once\)$", line)]
    folded = [
        piece
        for line in lines
        for piece in textwrap.wrap(
            line, LONGEST_LINE, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        )
    ]
    return "\n".join(folded) + "\n"


def renewed(readme: str, output: str) -> str:
    """Return the text of README.md with `output` between the two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}```text\n$ make run\n{shown(output)}```\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    """Renew README.md."""
    output = Path(arguments[0]).read_text(encoding="utf-8") if arguments else run()
    README.write_text(renewed(README.read_text(encoding="utf-8"), output), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
