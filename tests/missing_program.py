"""Programs that only some machines have: hide them from tests that are not marked as needing them, or skip those that are."""

from __future__ import annotations

import fnmatch
import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

# Markers, and the programs that only tests with the marker may find.
PROGRAMS = {
    "slurm": ("srun", "sbatch", "salloc", "squeue", "sacct*", "scancel", "scontrol", "sinfo", "slurm*", "munge*", "mariadb*"),
    "browser": ("chromium*", "google-chrome*"),
    "compiler": ("gcc*", "g++*", "cc", "c++", "c[89][0-9]", "clang*", "*-linux-gnu-g[c+]*", "nvcc", "ninja"),
}
_DEADLINE_S = 90
Box = tuple[float, float, float, float]


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, except in CI: CI has every program, so a test that cannot run there has failed."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def path_of_a_bare_machine(path: str, folder: Path) -> str:
    """Return `path` with each directory that holds a program of PROGRAMS replaced by one of links to the other programs."""
    patterns = [pattern for patterns in PROGRAMS.values() for pattern in patterns]
    directories = []
    for number, directory in enumerate(dict.fromkeys(path.split(os.pathsep))):
        names = os.listdir(directory) if os.path.isdir(directory) else []
        hidden = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
        if hidden:
            links = folder / str(number)
            links.mkdir(parents=True)
            for name in set(names) - hidden:
                (links / name).symlink_to(os.path.join(directory, name))
            directory = str(links)
        directories.append(directory)
    return os.pathsep.join(directories)


# Measure what is drawn, in page pixels, after layout: the source alone does not show what is visible.
_MEASURE = """
<script>
const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const colors = (s) => [s.stroke, s.fill, s.backgroundColor];
const seen = (e) => colors(getComputedStyle(e)).some((c) => c.startsWith("rgb("));
const charts = [...document.querySelectorAll("svg, .bars")].map((chart) => ({
  box: box(chart),
  marks: [...chart.querySelectorAll("polyline, rect, circle, .track i")].filter(seen).map(box),
  texts: [...chart.querySelectorAll("text, .label, .value")].map(box),
}));
const found = document.createElement("pre");
found.id = "measured";
found.textContent = JSON.stringify({ charts, width: document.documentElement.scrollWidth, window: innerWidth });
document.body.append(found);
</script>
"""


@dataclass(frozen=True)
class Chart:
    """Boxes (left, top, right, bottom) in pixels; `marks` are lines, bars and points with a visible color."""

    box: Box
    marks: tuple[Box, ...]
    texts: tuple[Box, ...]


@dataclass(frozen=True)
class Shown:
    """`console` holds the browser's messages; `wider_by` is the number of pixels by which the page exceeds the window."""

    charts: tuple[Chart, ...]
    console: tuple[str, ...]
    wider_by: int


def show(page: Path, folder: Path) -> Shown:
    """Open a page in a new browser whose files are in `folder`."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        skip_or_fail("no page can be shown without Chromium: apt-get install --no-install-recommends chromium")
    console = [line for line in _run(program, page, folder).stderr.splitlines() if "CONSOLE" in line]
    # The page's content policy forbids all scripts, including this measurement.
    source = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    measured_page = folder / "measured.html"
    measured_page.write_text(source.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    dom = _run(program, measured_page, folder).stdout
    match = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert match is not None, "the page was not laid out"
    measured = json.loads(html.unescape(match[1]))
    charts = (Chart(tuple(c["box"]), tuple(map(tuple, c["marks"])), tuple(map(tuple, c["texts"]))) for c in measured["charts"])
    return Shown(tuple(charts), tuple(console), measured["width"] - measured["window"])


def _run(program: str, page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [program, *flags, page.absolute().as_uri()], capture_output=True, text=True, timeout=_DEADLINE_S, check=True
    )
    return done
