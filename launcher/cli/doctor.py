"""The verb `doctor`: check whether this machine, or a cluster's nodes, have what a run needs; starts no run."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher.cli.accounts import check_accounts
from launcher.cli.render import terminal
from launcher.cli.render.sections import Part, Rows, Section, Text, Tone
from launcher.cli.verbs import flags_of
from launcher.cli.worker_process import ended_by_signals, worker_environment
from launcher.clusters.backends import nodes_for
from launcher.clusters.check_results import (
    FAILURE,
    NODE_MODULE,
    OK,
    SHARED_FILE_VARIABLE,
    VERDICTS,
    WARNING,
    CheckResult,
    MachineReport,
    ReportReader,
    from_problem,
    with_differences,
    worst,
)
from launcher.clusters.node_command import NodeCommand, uninterrupted
from launcher.clusters.preflight import existing_folder
from launcher.config.compose import run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, ConfigError, RunError, SubmitError
from launcher.plan.quantities import format_count

_VERDICT_COLUMNS, _LABEL_COLUMNS = 9, 23
_TONES: dict[str, Tone] = {OK: "good", WARNING: "warn", FAILURE: "bad"}


@dataclass(frozen=True)
class DoctorReport:
    """All results: `here` for this machine as the submitting one, `nodes` for the machines that train."""

    here: tuple[CheckResult, ...]
    nodes: tuple[MachineReport, ...]

    @property
    def results(self) -> tuple[CheckResult, ...]:
        return (*self.here, *(result for report in self.nodes for result in report.results))


def check_machines(arguments: argparse.Namespace) -> int:
    """Print the findings of the checks; returns 1 if one failed."""
    jobs = run_hydra(arguments.overrides, flags_of("doctor"))
    if len(jobs) > 1:
        raise ConfigError("doctor checks one set of settings", where="command line", value="-m", remedy="leave out -m")
    report = examine(jobs[0].config, time.monotonic() + arguments.timeout * 60)
    if arguments.json:
        print(to_json(report))
    else:
        terminal.show(*to_sections(report), label_columns=_LABEL_COLUMNS)
    return EXIT_FAILED if worst(report.results) == FAILURE else 0


def examine(config: RunConfig, deadline: float) -> DoctorReport:
    """Check this machine and a cluster's nodes until `deadline`, a time.monotonic() time."""
    # Nodes have different working directories.
    root = Path(config.run.root).expanduser().absolute()
    config = config.model_copy(update={"run": config.run.model_copy(update={"root": str(root)})})
    nodes, reader, here = nodes_for(config.cluster.kind), ReportReader(), check_accounts(config)
    with ended_by_signals():
        try:
            submission = nodes.check_submission(config) if nodes is not None else []
            here = [*submission, *here]
            if nodes is None or not nodes.runs_elsewhere(config):
                print("checking this machine", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", NODE_MODULE]
                with NodeCommand(command, config.model_dump_json(), worker_environment()) as checks:
                    checks.show_lines(reader.feed, deadline)
                if not reader.reports:
                    messages = " / ".join(line.strip() for line in list(checks.errors)[-2:])
                    remedy = "give them more time with --timeout"
                    raise RunError("the checks of this machine did not end", value=messages, remedy=remedy)
            elif worst(submission) != FAILURE:
                print("checking the nodes; this may wait in a queue, and Ctrl-C cancels it", file=sys.stderr, flush=True)
                with _write_shared_file(root) as environ:
                    here += nodes.check_nodes(config, environ, deadline, reader)
        except (RunError, SubmitError) as error:
            here += [from_problem(problem, name="nodes") for problem in error.problems]
    return DoctorReport(tuple(here), tuple(with_differences([*reader.reports.values()])))


@contextmanager
def _write_shared_file(root: Path) -> Iterator[dict[str, str]]:
    """Write a file beside the runs, by which nodes recognize the folder; yields their variable, or nothing if this fails."""
    file, content = existing_folder(root) / f".launcher-doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        file.write_text(content)
    except OSError:
        # The nodes report whether they see the folder.
        yield {}
        return
    try:
        yield {SHARED_FILE_VARIABLE: f"{file}={content}"}
    finally:
        with uninterrupted(), suppress(OSError):
            file.unlink()


def to_json(report: DoctorReport) -> str:
    """Return the report as JSON, with the worst verdict of all results."""
    nodes = {node.machine: {"verdict": worst(node.results), "results": list(map(asdict, node.results))} for node in report.nodes}
    return terminal.as_json({"verdict": worst(report.results), "here": list(map(asdict, report.here)), "nodes": nodes})


def to_sections(report: DoctorReport) -> list[Part]:
    """Return each result once with the nodes that share it, worst first; one node's measurements stand for all."""
    num_nodes = len(report.nodes)
    # What a row shows, and the nodes that share it; without `seen` it is a measurement.
    shown: dict[CheckResult, tuple[str, list[str]]] = {}
    for node in report.nodes:
        for result in node.results:
            is_measured = num_nodes > 1 and result.verdict == OK and not result.must_match
            shown.setdefault(replace(result, seen="") if is_measured else result, (result.seen, []))[1].append(node.machine)
    results = [(result, result.seen) for result in report.here]
    for result, (seen, machines) in sorted(
        shown.items(), key=lambda item: VERDICTS.index(item[0].verdict) if num_nodes > 1 else 0
    ):
        prefix = ""
        if not result.seen:
            prefix = f"{len(machines)} of {num_nodes} nodes, such as {machines[0]}: "
        elif num_nodes > 1:
            prefix = "all nodes: " if len(machines) == num_nodes else f"{', '.join(machines)}: "
        results.append((result, f"{prefix}{seen}"))
    rows = [
        (f"{result.verdict:<{_VERDICT_COLUMNS}}{result.name}", text + (f"\nfix: {result.remedy}" if result.remedy else ""))
        for result, text in results
    ]
    counts = Counter(result.verdict for result in report.results)
    bad = [format_count(counts[verdict], verdict) for verdict in (FAILURE, WARNING) if counts[verdict]]
    conclusion = f"{', '.join(bad) or 'everything is ok'}; {format_count(num_nodes, 'node')} reported"
    return [Rows(rows), Section("", [Text(conclusion, _TONES[worst(report.results)])])]
