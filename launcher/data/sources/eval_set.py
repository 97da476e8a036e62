"""The data of an evaluation set: how its rows are read and cached, and its problems in terms of its own settings."""

from __future__ import annotations

from dataclasses import replace

from launcher.config.sections.data import ChecksSection, DataSection, RowSource, Source
from launcher.config.sections.evaluation import EvalSet
from launcher.data.sources import locate
from launcher.data.sources.splits import HELD_OUT
from launcher.errors import Problem


def make_set_data(eval_set: EvalSet, data: DataSection) -> DataSection:
    """Return the settings for an evaluation set's cache: rows are built as for `data`, without settings that select documents.

    Documents without a trained token are left out; the checks bad_rows and dropped are those of `data`.
    """
    shared = {name: getattr(eval_set, name) for name in RowSource.model_fields}
    if eval_set.split is None and locate.has_splits(eval_set.path):
        shared["split"] = HELD_OUT
    kept = dict.fromkeys(("held_out_in_train", "truncated", "no_turn_end", "empty_answer"), "keep")
    checks = ChecksSection(**kept, bad_rows=data.checks.bad_rows, dropped=data.checks.dropped)
    # data.exclude names documents of the training data.
    own = {
        "exclude": None,
        "path": None,
        "sources": (Source(**shared),),
        "eval_fraction": 0.0,
        "eval_path": None,
        "eval_split": None,
    }
    return data.model_copy(update={**own, "checks": checks})


def name_set(problem: Problem, setting: str, eval_set: EvalSet) -> Problem:
    """Return a problem of the set's data with `setting` and the name of the set."""
    where = f"{setting} ({eval_set.name})" + (f", {problem.where}" if problem.where else "")
    return replace(problem, where=where)
