"""`data --scored RUN`: the documents in a run's data that are worth a look, by their losses under the run's weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli.arguments import VerbParser
from launcher.cli.pages import html_page
from launcher.cli.worker_process import run_scoring
from launcher.data.triage import ranking
from launcher.data.triage.exclusions import write_exclusions
from launcher.errors import ConfigError
from launcher.security import owners

_ROWS = 20


def run(tokens: list[str]) -> int:
    """Score unscored documents, and show which are likely mislabeled, memorized, or have nothing to learn."""
    arguments = _parser().parse_args(tokens)
    run_dir = run_store.find_run(arguments.scored, Path(arguments.root))
    owners.require_run(run_dir.root)
    page = html_page.require_writable_page(Path(arguments.html)) if arguments.html else None
    exclude = _require_new_file(Path(arguments.exclude)) if arguments.exclude else None
    options = ["--split", arguments.split]
    options += [] if arguments.step is None else ["--step", str(arguments.step)]
    report = run_scoring("launcher.worker.scoring.triage", run_dir.plan, *options)
    if exclude is not None:
        _write_exclusions(exclude, report, arguments.finding or [ranking.MISLABELED])
    if page is not None:
        from launcher.cli.pages import scored_html

        html_page.write(page, scored_html.page(report))
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    from launcher.cli.views import scored_view

    print("\n".join(scored_view.lines(report, arguments.show)))
    if exclude is not None:
        print(f"\nwritten: {exclude}; leave these documents out of the next run with data.exclude={exclude}")
    if page is not None:
        print(f"\npage: {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Rank the documents of a run's data: likely mislabeled, memorized, or with nothing to learn. The documents "
        "are scored on this machine with and without their prompts, once: later calls read the scores."
    )
    parser = VerbParser(prog="python -m launcher data --scored", description=about)
    parser.add_argument("--scored", metavar="RUN", required=True, help="name of the run, or path of its directory")
    parser.add_root()
    step = "step whose weights score the documents, 0 for the initial ones (default: the newest checkpoint)"
    parser.add_argument("--step", type=int, help=step)
    parser.add_argument("--split", default="train", help="train, held_out, or a set of eval.sets (default: train)")
    parser.add_argument("--show", type=int, default=_ROWS, metavar="N", help=f"documents of each list (default: {_ROWS})")
    parser.add_argument("--json", action="store_true", help="print all documents as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write one HTML page with the texts")
    exclude = "write a list of documents, which data.exclude=FILE leaves out of the next run"
    parser.add_argument("--exclude", metavar="FILE", help=exclude)
    finding = f"finding whose documents --exclude writes, repeatable (default: {ranking.MISLABELED})"
    parser.add_argument("--finding", action="append", choices=tuple(ranking.FINDINGS), help=finding)
    return parser


def _require_new_file(file: Path) -> Path:
    if file.exists() or not file.absolute().parent.is_dir():
        message = "the file exists already" if file.exists() else "the folder of the file does not exist"
        raise ConfigError(message, where="--exclude", value=str(file), remedy="name another file")
    return file


def _write_exclusions(file: Path, report: dict[str, Any], names: list[str]) -> None:
    """Write the documents of the findings `names`; from the ranking of mislabeled documents, only likely ones."""
    if not report["has_origins"]:
        message = "the run's data cache does not record the contents of its documents"
        remedy = "start a run with the same settings: its data is rebuilt with the origin of each document"
        raise ConfigError(message, where="--exclude", value=report["run"], remedy=remedy)
    chosen = [
        {key: entry[key] for key in ("content", "where", "loss", "loss_alone")} | {"finding": name}
        for name in names
        for entry in report["lists"][name]
        if entry.get("likely", True)
    ]
    write_exclusions(file, {entry["content"]: entry for entry in chosen}.values())
