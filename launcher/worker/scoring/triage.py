"""Ranks the documents in a run's data by score: `python -m launcher.worker.scoring.triage PLAN_JSON [--step N]`.

Writes progress to standard error and one JSON object to standard output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher import run_store
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.cache.cache_store import read_report
from launcher.data.cache.split import Split
from launcher.data.sources.origins import DocumentOrigins
from launcher.data.triage import answers_alone, ranking
from launcher.data.triage.ranking import DocumentScores
from launcher.errors import SubmitError
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.scoring.command_process import answer, run_process
from launcher.worker.scoring.document_texts import DocumentTexts
from launcher.worker.scoring.passes import Progress, ScorePass, score, temporary_folder
from launcher.worker.scoring.weights import find_weights

TRAIN = "train"
# Number of documents per list that the page shows with their texts.
_NUM_TEXTS = 100


def rank_documents(
    plan_path: Path, step: int | None, split_name: str, num_ranks: int | None, on_progress: Progress
) -> dict[str, Any]:
    """Score a split's documents with and without their prompts, and return lists of those worth a look."""
    run = RunDir.of_plan(plan_path.absolute())
    plan = run_store.load_plan(run)
    facts, is_held_out = find_split(plan, split_name)
    weights = find_weights(run, plan, step)
    with_prompt = ScorePass(title="answers with their prompts", facts=facts, held_out=is_held_out)
    split = with_prompt.open()
    with temporary_folder() as folder:
        alone = answers_alone.write(split, folder, plan.config.data)
        passes = [with_prompt]
        if alone is not None:
            passes = [
                with_prompt.model_copy(update={"title": f"pass 1 of 2, {with_prompt.title}"}),
                ScorePass(title="pass 2 of 2, answers without prompts", facts=alone.facts),
            ]
        scores = score(plan, weights, passes, on_progress, num_ranks)
        num_tokens, loss = ranking.mean_losses(split, scores.log_probs[0])
        loss_alone = np.full(split.num_docs, np.nan)
        if alone is not None:
            loss_alone[alone.documents] = ranking.mean_losses(passes[1].open(), scores.log_probs[1])[1]
    documents = DocumentScores(num_tokens, loss, loss_alone)
    lists = _make_lists(plan, facts, is_held_out, split, documents)
    return {
        "run": plan.run_name,
        "step": weights.step,
        "split": split_name,
        "documents": split.num_docs,
        "trained_tokens": int(num_tokens.sum()),
        "mean_loss": float(np.nansum(loss * num_tokens) / max(1, num_tokens.sum())),
        "has_origins": DocumentOrigins.open(facts.cache_dir, is_held_out) is not None,
        "was_stored": scores.num_computed == 0,
        "lists": lists,
    }


def find_split(plan: LaunchPlan, name: str) -> tuple[DataFacts, bool]:
    """Return the data of the split or evaluation set `name`, and whether it is the held-out split.

    Raises:
        SubmitError: if the run has no data of that name; lists the existing names.
    """
    if plan.data is not None and name == TRAIN:
        return plan.data, False
    if plan.data is not None and name == HELD_OUT and plan.data.num_eval_rows:
        return plan.data, True
    if name in plan.eval_sets:
        return plan.eval_sets[name], False
    has_held_out = plan.data is not None and plan.data.num_eval_rows > 0
    names = [TRAIN, *([HELD_OUT] if has_held_out else []), *plan.eval_sets]
    raise SubmitError("the run has no such split", where="--split", value=name, remedy=f"choose one of: {', '.join(names)}")


def _make_lists(
    plan: LaunchPlan, facts: DataFacts, is_held_out: bool, split: Split, scores: DocumentScores
) -> dict[str, list[dict[str, Any]]]:
    by_name = {ranking.MISLABELED: ranking.rank_mislabeled(scores), **ranking.find_known(scores)}
    origins, texts = DocumentOrigins.open(facts.cache_dir, is_held_out), DocumentTexts(plan, split)
    sources = source_names(plan, facts)
    is_likely = ranking.is_likely_mislabeled(scores)

    def describe(document: int, name: str, rank: int) -> dict[str, Any]:
        entry = {
            "rank": rank,
            "document": document,
            "where": "" if origins is None else origins.where(document),
            "source": sources[int(split.doc_source[document])],
            "content": "" if origins is None else origins.content_id(document),
            "tokens": int(scores.num_tokens[document]),
            "loss": _rounded(scores.loss[document]),
            "loss_alone": _rounded(scores.loss_alone[document]),
        }
        if name == ranking.MISLABELED:
            entry["likely"] = bool(is_likely[document])
        return entry | (texts.of(document) if rank <= _NUM_TEXTS else {})

    return {
        name: [describe(document, name, rank) for rank, document in enumerate(_without_repeats(documents, origins), start=1)]
        for name, documents in by_name.items()
    }


def source_names(plan: LaunchPlan, facts: DataFacts) -> tuple[str, ...]:
    """Return the names of the sources, indexed by their numbers in the cache of `facts`."""
    return tuple(source["name"] for source in read_report(facts.cache_dir)["sources"])


def _without_repeats(documents: np.ndarray, origins: DocumentOrigins | None) -> list[int]:
    """Return the documents without repeats, which occur in sources with epochs above 1."""
    if origins is None:
        return [int(document) for document in documents]
    seen: set[bytes] = set()
    kept = []
    for document in documents.tolist():
        if (key := origins.values[document].tobytes()) not in seen:
            seen.add(key)
            kept.append(document)
    return kept


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.scoring.triage")
    parser.add_argument("plan", type=Path, metavar="PLAN_JSON")
    parser.add_argument("--step", type=int)
    parser.add_argument("--split", default=TRAIN)
    parser.add_argument("--ranks", type=int)
    arguments = parser.parse_args(argv)
    return answer(
        lambda on_progress: rank_documents(arguments.plan, arguments.step, arguments.split, arguments.ranks, on_progress)
    )


if __name__ == "__main__":
    run_process(main)
