"""Draw docs/images/status.svg and docs/images/report.png from a run.

python docs/make_pictures.py          train the tiny model in a temporary folder, then draw its run
python docs/make_pictures.py RUN      draw an existing run, given as the path of its directory

status.svg shows `launcher status --watch`; report.png shows the top of the page of `launcher report` in Chromium.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).resolve().parent / "images"
LAUNCHER = (sys.executable, "-m", "launcher")
# A run of a minute or so on two idle cores, long enough for curves with a shape.
TRAINING = (
    *("model=tiny", "model.dtype=fp32", "train.max_steps=60", "train.global_batch_size=4", "data.max_length=256"),
    *("optim.lr=1e-2", "checkpoint.save_every=30", "eval.every=15", "tracking=none"),
    "run.name=tiny-demo",
)
COLUMNS = 120
PAGE_PIXELS = (1120, 1200)
MAX_BYTES = 300_000
DEADLINE_S = 1200


def main() -> int:
    """Draw both pictures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", nargs="?", type=Path, help="directory of a run (default: train one)")
    run: Path | None = parser.parse_args().run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if run is None:
            subprocess.run([*LAUNCHER, *TRAINING], cwd=folder, check=True, timeout=DEADLINE_S)
            run = folder / "runs" / "tiny-demo"
        run = run.resolve()
        pictures = [draw_status(run), draw_report(run, folder)]
    for picture in pictures:
        size = picture.stat().st_size
        print(f"{picture.relative_to(IMAGES.parents[1])}  {size / 1000:.0f} kB")
        if size > MAX_BYTES:
            print(f"{picture.name} has more than {MAX_BYTES / 1000:.0f} kB: draw a shorter run", file=sys.stderr)
            return 1
    return 0


def draw_status(run: Path) -> Path:
    """Draw the final view of `status --watch` of a run, as SVG."""
    # Run in the folder above the runs, so that the view contains no path of this machine.
    command = [*LAUNCHER, "status", run.name, "--root", run.parent.name, "--watch"]
    shown = subprocess.run(command, cwd=run.parents[1], check=True, capture_output=True, text=True, timeout=DEADLINE_S).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "green"), f"python -m launcher status {run.name} --watch"))
    for line in shown.splitlines():
        console.print(Text.assemble((line[:12], "bold cyan"), line[12:]))
    picture = IMAGES / "status.svg"
    console.save_svg(str(picture), title="status", unique_id="status")
    return picture


def draw_report(run: Path, folder: Path) -> Path:
    """Draw the top of a run's report page with headless Chromium, which keeps its files in `folder`."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("report.png needs Chromium: apt-get install --no-install-recommends chromium")
    page = folder / "report.html"
    subprocess.run([*LAUNCHER, "report", str(run), "--html", str(page)], check=True, timeout=DEADLINE_S)
    picture = IMAGES / "report.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--window-size={},{}".format(*PAGE_PIXELS)]
    command = [browser, *flags, f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S, env={**os.environ, "TZ": "UTC"})
    return picture


if __name__ == "__main__":
    sys.exit(main())
