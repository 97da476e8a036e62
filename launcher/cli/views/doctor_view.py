"""The page and the JSON of `launcher doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from launcher.cli.formatting import as_json, table, wrap
from launcher.clusters.check_results import FAILURE, OK, VERDICTS, WARNING, CheckResult, MachineReport, worst
from launcher.plan.quantities import format_count

_VERDICT_WIDTH, _NAME_WIDTH = 9, 14
_INDENT = _VERDICT_WIDTH + _NAME_WIDTH
_SUMMARY_WIDTH = 70


@dataclass(frozen=True)
class DoctorReport:
    """All results: `here` for this machine as the submitting one, `nodes` for the machines that train.

    `is_local` is true if this machine is also the only node.
    """

    here: tuple[CheckResult, ...]
    nodes: tuple[MachineReport, ...]
    is_local: bool

    @property
    def results(self) -> tuple[CheckResult, ...]:
        return (*self.here, *(result for report in self.nodes for result in report.results))


def to_json(report: DoctorReport) -> str:
    """Return the report as JSON, with the worst verdict of all results."""
    nodes = {node.machine: {"verdict": node.verdict, "results": list(map(asdict, node.results))} for node in report.nodes}
    return as_json({"verdict": worst(report.results), "here": list(map(asdict, report.here)), "nodes": nodes})


def to_lines(report: DoctorReport) -> list[str]:
    """Return the page: a list for one machine; for several nodes a table, deviating nodes first, then their findings."""
    lines = [line for result in report.here for line in _result_lines(result)]
    if report.nodes and not report.is_local:
        differing = {node.machine: _differing(node, report.nodes) for node in report.nodes}
        nodes = sorted(report.nodes, key=lambda node: (not differing[node.machine], VERDICTS.index(node.verdict), node.machine))
        rows = [(node.machine, node.verdict, differing[node.machine] or "nothing") for node in nodes]
        lines += ["", *table(("node", "verdict", "what only some nodes have"), rows), ""]
        lines += [line for result, names in _merged(nodes) for line in _result_lines(result, names, len(nodes))]
    else:
        lines += [line for node in report.nodes for result in node.results for line in _result_lines(result)]
    return [*lines, "", _summary(report)]


def _differing(node: MachineReport, nodes: Sequence[MachineReport]) -> str:
    """Summarize a node's warnings and failures that not all nodes have; measured values do not count."""
    wrong = {(result.name, result.verdict): result for result in node.results if result.verdict != OK}
    others = [{(result.name, result.verdict) for result in other.results} for other in nodes]
    parts = [f"{result.name}: {result.seen}" for key, result in wrong.items() if not all(key in other for other in others)]
    text = "; ".join(parts)
    return text if len(text) <= _SUMMARY_WIDTH else f"{text[: _SUMMARY_WIDTH - 3]}..."


def _merged(nodes: Sequence[MachineReport]) -> list[tuple[CheckResult, list[str]]]:
    """Return each result once with its nodes, worst first; measurements that are ok are shown for one node only."""
    names: dict[CheckResult, list[str]] = {}
    examples: dict[tuple[str, int], CheckResult] = {}
    for node in nodes:
        places: Mapping[str, int] = Counter()
        for result in node.results:
            if result.verdict == OK and not result.must_match:
                # The first node's line represents the other nodes' measurements.
                place = places.get(result.name, 0)
                places = {**places, result.name: place + 1}
                result = examples.setdefault((result.name, place), result)
            names.setdefault(result, []).append(node.machine)
    return sorted(names.items(), key=lambda item: VERDICTS.index(item[0].verdict))


def _result_lines(result: CheckResult, names: Sequence[str] = (), num_nodes: int = 1) -> list[str]:
    seen = result.seen
    if names:
        if result.verdict == OK and not result.must_match:
            seen = f"{seen} ({names[0]})" + (f"; ok on {len(names)} of {num_nodes} nodes" if len(names) > 1 else "")
        else:
            seen = f"{'all nodes' if len(names) == num_nodes > 1 else ', '.join(names)}: {seen}"
    lines = [f"{result.verdict:<{_VERDICT_WIDTH}}{result.name:<{_NAME_WIDTH}}{seen}"]
    if result.remedy:
        lines.append(f"{'':{_INDENT}}fix: {result.remedy}")
    return wrap(lines, _INDENT)


def _summary(report: DoctorReport) -> str:
    counts = Counter(result.verdict for result in report.results)
    parts = [format_count(counts[verdict], verdict) for verdict in (FAILURE, WARNING) if counts[verdict]]
    machines = "" if report.is_local else f"; {format_count(len(report.nodes), 'node')} reported"
    return f"{', '.join(parts) or 'everything is ok'}{machines}"
