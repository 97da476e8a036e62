"""What `diff` compares in runs: settings, data, model, code, versions, machines and results, each as names and values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import json_records, run_store
from launcher.cli.views.run_summary import summary
from launcher.clusters.backends import status_reader_for
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_metrics

# The sections in which differences are shown, in order.
SECTIONS = ("settings", "model", "data", "code", "versions", "machines", "results")
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
GIT_COMMIT = "git commit"


@dataclass(frozen=True)
class ComparedRun:
    """One side of a comparison: its name, and names and values by section. `losses` are the training losses by step."""

    name: str
    sections: Mapping[str, Mapping[str, Any]]
    losses: Mapping[int, float] = field(default_factory=dict)


def read(run: RunDir) -> ComparedRun:
    """Read the values of a run to compare.

    Raises:
        LauncherError: if its plan or status cannot be read.
    """
    plan = run_store.read_plan_values(run_store.newest_plan_path(run))
    status = status_reader_for(run, run_store.read_placement(run).kind).status(run)
    values = summary(run, status)
    lines = read_metrics(run.metrics, ("train/loss",))
    losses = {int(line["trainer/step"]): float(line["train/loss"]) for line in lines if "train/loss" in line}
    sections = {
        "settings": _flatten(plan["config"], without=_NAMES),
        "model": _flatten({"model": plan["model"], "parent": plan.get("lineage")}, without=_PLACES),
        "data": _data(plan),
        "code": _code(plan),
        "versions": {"python": plan["provenance"]["python"], **plan["provenance"]["packages"]},
        "machines": _flatten({"topology": plan["topology"], "batch": plan["batch"], "memory": plan["memory"]}),
        "results": _results(values),
    }
    return ComparedRun(run.root.name, sections, losses)


def of_settings(name: str, settings: Mapping[str, Any]) -> ComparedRun:
    """Return a side for settings without a run."""
    return ComparedRun(name, {"settings": _flatten(settings, without=_NAMES)})


def _flatten(values: Mapping[str, Any], prefix: str = "", without: Collection[str] = ()) -> dict[str, Any]:
    """Return the leaves of nested mappings and lists, keyed by their paths, without some keys."""
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
            leaves[key] = value
    return leaves


def _data(plan: Mapping[str, Any]) -> dict[str, Any]:
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


def _code(plan: Mapping[str, Any]) -> dict[str, Any]:
    provenance = plan["provenance"]
    return {
        "launcher": provenance["launcher_version"],
        GIT_COMMIT: provenance["git_commit"],
        "uncommitted changes": provenance["git_dirty"],
        "overrides": " ".join(provenance["overrides"]),
    }


def _results(values: Mapping[str, Any]) -> dict[str, Any]:
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


def compare(left: ComparedRun, right: ComparedRun) -> dict[str, list[ValueDifference]]:
    """Return the differences by section, for sections that both sides have; omit sections without differences."""
    sections = {}
    for name in SECTIONS:
        if name not in left.sections or name not in right.sections:
            continue
        before, after = left.sections[name], right.sections[name]
        keys = dict.fromkeys((*before, *after))
        differences = [ValueDifference(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]
        if name == "results":
            differences = [*_at_same_step(left.losses, right.losses), *differences]
        if differences:
            sections[name] = differences
    return sections


def _at_same_step(left: Mapping[int, float], right: Mapping[int, float]) -> Iterable[ValueDifference]:
    """Yield the training losses at the last step that both sides have logged, unless it is the last step of both."""
    common = left.keys() & right.keys()
    if common and not (max(common) == max(left) == max(right)):
        step = max(common)
        yield ValueDifference(f"training loss at step {step:,}", left[step], right[step])
