"""The rules by which a run keeps checkpoints, across attempts that evaluated different rows."""

from __future__ import annotations

from launcher import json_records, run_store
from launcher.checkpoint.retention import Retention
from launcher.plan.launch_plan import LaunchPlan, digest_of
from launcher.plan.run_dir import RunDir


def retention_of(run: RunDir, plan: LaunchPlan) -> Retention:
    """Return the rules of a plan of the run; `keep_best` prefers losses on the plan's evaluation rows."""
    section = plan.config.checkpoint
    if not section.keep_best:
        return Retention.of(section)
    rows = plan.eval_rows_digest(section.best_set)
    return Retention.of(section, rows, _plans_with_other_rows(run, rows, section.best_set))


def _plans_with_other_rows(run: RunDir, rows: str, set_name: str) -> frozenset[str]:
    """Return the digests of the run's plans in which an evaluation set has other rows than those with the digest `rows`."""
    others = set()
    for path in (run.plan, *run_store.changed_plan_paths(run), *run.plans.glob("*.json")):
        try:
            text = json_records.read_bytes(path).decode()
            if LaunchPlan.from_json(text).eval_rows_digest(set_name) != rows:
                others.add(digest_of(text))
        except (OSError, ValueError):
            # Its checkpoints count: nothing is known of their rows.
            continue
    return frozenset(others)
