"""The rows of one step of a run, with their documents' losses: `python -m launcher.worker.scoring.step PLAN_JSON STEP`.

PLAN_JSON is the plan of the attempt that ran the step. Writes progress to standard error and one JSON object to standard output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checkpoint import store
from launcher.data.cache.cache_store import read_report
from launcher.data.cache.split import Split
from launcher.data.row_order import RowOrder
from launcher.data.sources.origins import DocumentOrigins
from launcher.data.tokenization.encoder import import_tokenizers_without_torch
from launcher.errors import LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.scoring.command_process import answer, run_process
from launcher.worker.scoring.document_texts import DocumentTexts
from launcher.worker.scoring.passes import Progress, ScorePass, score
from launcher.worker.scoring.weights import ScoredWeights, find_weights


def describe_step(
    run: RunDir, plan: LaunchPlan, step: int, has_scores: bool, num_ranks: int | None, on_progress: Progress
) -> dict[str, Any]:
    """Return the documents in the rows of `step`, counted from 1; with `has_scores`, their losses under the checkpoint before it.

    Raises:
        RunError: if the plan has no data.
        DataError: if other users could have written its caches.
    """
    if plan.data is None:
        raise RunError("the plan has no data", where=str(run.root))
    split = Split.open(plan.data)
    rows = rows_of_step(plan, split, step)
    weights, reason = _find_weights_before(run, plan, step) if has_scores else (None, "")
    losses: dict[int, np.ndarray] = {}
    if weights is not None:
        one = ScorePass(title="rows of the step", facts=plan.data, rows=tuple(rows.tolist()))
        (log_probs,) = score(plan, weights, [one], on_progress, num_ranks).log_probs
        ends = np.cumsum(split.row_labels[rows])
        losses = {int(row): -part for row, part in zip(rows, np.split(log_probs, ends[:-1]), strict=True)}
    return {
        "step": step,
        "scored_at": None if weights is None else weights.step,
        "not_scored": reason,
        "rows": [_describe_row(plan, split, int(row), losses.get(int(row))) for row in rows],
    }


def rows_of_step(plan: LaunchPlan, split: Split, step: int) -> np.ndarray:
    """Return the rows of the global batch of `step`, counted from 1, in batch order."""
    size, data = plan.batch.global_batch_size, plan.config.data
    lengths = np.diff(split.rows) if data.group_by_length and not data.packing else None
    return RowOrder(split.num_rows, plan.config.run.seed, lengths, size).at((step - 1) * size, step * size)


def _find_weights_before(run: RunDir, plan: LaunchPlan, step: int) -> tuple[ScoredWeights | None, str]:
    """Return the weights of the newest checkpoint before `step`, or else the initial weights, and why there are none."""
    earlier = [one.step for one in store.list_checkpoints(run.checkpoints) if one.step < step]
    try:
        return find_weights(run, plan, max(earlier, default=0)), ""
    except LauncherError as error:
        reason = (
            f"the checkpoint of step {max(earlier)} cannot be used" if earlier else f"there is no checkpoint before step {step}"
        )
        kept = "" if earlier else "; checkpoint.keep_last keeps more checkpoints of a run to come"
        return None, f"{reason}{':' if earlier else ', and'} {error.problems[0].message}{kept}"


def _describe_row(plan: LaunchPlan, split: Split, row: int, losses: np.ndarray | None) -> dict[str, Any]:
    assert plan.data is not None
    origins, texts = DocumentOrigins.open(plan.data.cache_dir), DocumentTexts(plan, split)
    names = [source["name"] for source in read_report(plan.data.cache_dir)["sources"]]
    documents, first = [], 0
    for document in range(*split.row_docs(row).indices(split.num_docs)):
        begin, end = (int(at) for at in split.docs[document : document + 2])
        num_trained = int(split.trained[begin:end].sum())
        of_document = None if losses is None else losses[first : first + num_trained]
        first += num_trained
        documents.append(
            {
                "document": document,
                "where": "" if origins is None else origins.where(document),
                "source": names[int(split.doc_source[document])],
                "tokens": end - begin,
                "trained_tokens": num_trained,
                "loss": None if of_document is None or not len(of_document) else round(float(of_document.mean()), 4),
                "max_token_loss": None if of_document is None or not len(of_document) else round(float(of_document.max()), 4),
                **texts.of(document),
            }
        )
    return {"row": row, "documents": documents}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.scoring.step")
    parser.add_argument("plan", type=Path, metavar="PLAN_JSON")
    parser.add_argument("step", type=int)
    parser.add_argument("--no-scores", action="store_true")
    parser.add_argument("--ranks", type=int)
    chosen = parser.parse_args(argv)
    plan_path = chosen.plan.absolute()
    if chosen.no_scores:
        import_tokenizers_without_torch()

    def describe(on_progress: Progress) -> dict[str, Any]:
        plan, run = LaunchPlan.load(plan_path), RunDir.of_plan(plan_path)
        return describe_step(run, plan, chosen.step, not chosen.no_scores, chosen.ranks, on_progress)

    return answer(describe)


if __name__ == "__main__":
    run_process(main)
