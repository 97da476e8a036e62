"""The data of an evaluation set: how its rows are read and cached, and its problems in terms of its own settings."""

from __future__ import annotations

from dataclasses import replace

from launcher.config.sections.data import ChecksSection, DataSection, RowSource, Source
from launcher.config.sections.evaluation import EvalSet
from launcher.data.sources import locate
from launcher.data.sources.splits import HELD_OUT
from launcher.errors import Problem

# Settings in the remedies for a row that does not match its format; see launcher.config.sections.data.COLUMNS_EXAMPLE.
_TRAINING_EXAMPLE = "data.sources=[{name: train, "


def make_set_data(eval_set: EvalSet, data: DataSection) -> DataSection:
    """Return the settings for an evaluation set's cache: rows are built as for `data`, without settings that select documents.

    Documents without a trained token are left out; the set is refused if they exceed data.checks.max_dropped. Unusable rows are
    treated as in `data`.
    """
    shared = {name: getattr(eval_set, name) for name in RowSource.model_fields}
    if eval_set.split is None and locate.has_splits(eval_set.path):
        shared["split"] = HELD_OUT
    kept = dict.fromkeys(("held_out_in_train", "truncated", "no_turn_end", "empty_answer"), "keep")
    shares = {"max_dropped": data.checks.max_dropped, "max_bad_rows": data.checks.max_bad_rows}
    checks = ChecksSection(**kept, unsure_border="drop", bad_rows=data.checks.bad_rows, **shares)
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
    """Return a problem of the set's data with `setting`, the name of the set, and a remedy that changes the set."""
    where = f"{setting} ({eval_set.name})" + (f", {problem.where}" if problem.where else "")
    remedy = problem.remedy.replace(_TRAINING_EXAMPLE, f"eval.sets=[{{name: {eval_set.name}, ")
    return replace(problem, where=where, remedy=remedy)


def nothing_to_score(setting: str, eval_set: EvalSet) -> Problem:
    """Return the problem of a set that has no document whose loss can be computed."""
    return Problem(
        "no document of the evaluation set has a trained token",
        where=f"{setting} ({eval_set.name})",
        value=eval_set.path,
        remedy="add rows with an assistant message or a completion, or raise data.max_length",
    )
