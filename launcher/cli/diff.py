"""The verb `diff`: the differences between two runs, or between a run and a settings file."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.cli.render import terminal
from launcher.cli.render.sections import Section, Table, Text
from launcher.cli.status import summarize
from launcher.clusters.backends import status_reader_for
from launcher.config.command_line import is_run_file
from launcher.errors import LauncherError
from launcher.runs import json_records, run_store
from launcher.security.redaction import redact_setting

# The sections in which differences are shown, in order.
_SECTIONS = ("settings", "model", "data", "code", "versions", "machines", "results")
# Settings that every run has its own values for, or that follow from other differences.
_NAMES = ("run.name", "run.root")
_PLACES = ("model.path", "model.tokenizer_path", "model.config", "data.cache_dir", "data.chat_template")
# Results and their metrics: medians over the last steps, and values of the last step.
_MEDIANS = {
    "tokens per second": "perf/tokens_per_sec",
    "MFU": "perf/mfu",
    "seconds per step": "time/step_s",
}
_LAST = {
    "training loss": "train/loss",
    "gradient norm": "train/grad_norm",
    "tokens trained": "trainer/tokens",
    "epochs": "trainer/epoch",
    "peak memory, GiB": "memory/peak_active_gib",
    "dollars per million tokens": "cost/usd_per_million_tokens",
}
_MAX_CHARS = 200


@dataclass(frozen=True)
class ComparedRun:
    """One side of a comparison: its name, and names and values by section."""

    name: str
    sections: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ValueDifference:
    """A value that differs, or None if a side does not have it."""

    key: str
    left: Any
    right: Any

    @property
    def relative_change(self) -> float | None:
        """The change from left to right as a fraction, or None if the values are not numbers."""
        numbers = [value for value in (self.left, self.right) if isinstance(value, int | float) and not isinstance(value, bool)]
        return (self.right - self.left) / abs(self.left) if len(numbers) == 2 and self.left else None


def compare_runs(arguments: argparse.Namespace) -> int:
    """Print the differences of two runs."""
    left, right = (_read_side(word, arguments.root) for word in (arguments.left, arguments.right))
    sections = _compare(left, right)
    if arguments.json:
        values: dict[str, Any] = {"left": left.name, "right": right.name}
        for name in _SECTIONS:
            if name in left.sections and name in right.sections:
                values[name] = [asdict(one) for one in sections.get(name, [])]
        print(terminal.as_json(values))
    else:
        terminal.show(*_list_sections(left, right, sections))
    return 0


def _read_side(word: str, root: Path) -> ComparedRun:
    """Return what a command line word names: a run, or a run's file, which has only settings."""
    if is_run_file(word):
        from launcher.config.compose import compose_one

        return ComparedRun(word, {"settings": _flatten(compose_one([word]).config.model_dump(mode="json"), without=_NAMES)})
    run = run_store.find_run(word, root)
    plan = run_store.read_plan_values(run_store.newest_plan_path(run))
    status = status_reader_for(run, run_store.read_placement(run).kind).status(run)
    provenance = plan["provenance"]
    sections = {
        "settings": _flatten(plan["config"], without=_NAMES),
        "model": _flatten({"model": plan["model"], "parent": plan.get("lineage")}, without=_PLACES),
        "data": _list_data(plan),
        "code": {
            "launcher": provenance["launcher_version"],
            "git commit": provenance["git_commit"],
            "uncommitted changes": provenance["git_dirty"],
            "overrides": " ".join(provenance["overrides"]),
        },
        "versions": {"python": provenance["python"], **provenance["packages"]},
        "machines": _flatten({"topology": plan["topology"], "batch": plan["batch"], "memory": plan["memory"]}),
        "results": _list_results(summarize(run, status)),
    }
    return ComparedRun(run.root.name, sections)


def _flatten(values: Mapping[str, Any], prefix: str = "", without: Collection[str] = ()) -> dict[str, Any]:
    """Return the leaves of nested mappings and lists, keyed by their paths, without some keys, and without secrets."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in without:
            continue
        if isinstance(value, Mapping) and value:
            leaves |= _flatten(value, f"{key}.", without)
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            leaves |= _flatten({f"{key}[{i}]": item for i, item in enumerate(value)}, without=without)
        else:
            leaves[key] = redact_setting(key, value) if isinstance(value, str) else value
    return leaves


def _list_data(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts and digests of the data and evaluation sets, and of sources if the cache still exists."""
    data = plan.get("data")
    if not isinstance(data, Mapping):
        return {}
    values = _flatten({"data": data}, without=_PLACES)
    if template := data.get("chat_template"):
        values["data.chat_template"] = f"digest {hashlib.blake2b(template.encode(), digest_size=6).hexdigest()}"
    for name, facts in (plan.get("eval_sets") or {}).items():
        prefix = f"eval_sets.{name}"
        values |= _flatten(facts, f"{prefix}.", without=(f"{prefix}.cache_dir", f"{prefix}.chat_template"))
    with suppress(LauncherError, OSError, ValueError, KeyError, TypeError):
        report = json_records.read_json(Path(data["cache_dir"]) / "meta.json")["report"]
        for source, built in zip(plan["config"]["data"]["sources"], report["sources"], strict=False):
            values[f"digest of {source['path']}"] = built["digest"]
    return values


def _list_results(values: Mapping[str, Any]) -> dict[str, Any]:
    cost, kept = values["cost"] or {}, values["goodput"] or {}
    results = {
        "state": values["state"],
        "steps": values["step"],
        "attempts": values["attempt"],
        "held-out loss": values["eval_loss"],
        **{name: values["metrics"].get(metric) for name, metric in _LAST.items()},
        **{name: values["usual"].get(metric, values["metrics"].get(metric)) for name, metric in _MEDIANS.items()},
        "goodput": kept.get("fraction"),
        "hours since submission": None if "wall_s" not in kept else kept["wall_s"] / 3600,
        "GPU hours" if values["device"] == "cuda" else "rank hours": cost.get("gpu_hours"),
        "cost, dollars": cost.get("usd"),
        "checkpoints": values["checkpoints"],
        "alerts": len(values["alerts"]),
    }
    return {name: value for name, value in results.items() if value is not None}


def _compare(left: ComparedRun, right: ComparedRun) -> dict[str, list[ValueDifference]]:
    """Return the differences by section, for sections that both sides have; omit sections without differences."""
    sections = {}
    for name in _SECTIONS:
        if name not in left.sections or name not in right.sections:
            continue
        before, after = left.sections[name], right.sections[name]
        keys = dict.fromkeys((*before, *after))
        differences = [ValueDifference(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]
        if differences:
            sections[name] = differences
    return sections


def _list_sections(left: ComparedRun, right: ComparedRun, sections: Mapping[str, Sequence[ValueDifference]]) -> list[Section]:
    """Return a table for each section with differences."""
    if not sections:
        return [Section("", [Text(f"no differences between {left.name} and {right.name}")])]
    names, tables = (left.name, right.name), []
    for section, differences in sections.items():
        rows = []
        for one in differences:
            change = one.relative_change if section == "results" else None
            shown = "" if change is None else f"{change:+.1%}"
            rows.append((one.key, _format_value(one.left), _format_value(one.right), shown))
        if any(row[3] for row in rows):
            tables.append(Table((section, *names, "change"), rows, numbers=(3,)))
        else:
            tables.append(Table((section, *names), [row[:3] for row in rows]))
    return [Section("", [table]) for table in tables]


def _format_value(value: Any) -> str:
    """Return a value as a single line of text."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:,.1f}".removesuffix(".0") if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_value, value))
    text = str(value).replace("\n", " ")
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."
