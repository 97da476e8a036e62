"""Reports on documents of a run's data with their losses, for `why` and `data --scored`.

    python -m launcher.evaluate.documents_report PLAN_JSON --rows-of STEP [--no-scores]
    python -m launcher.evaluate.documents_report PLAN_JSON [--step N] [--split NAME]

The first describes the rows of a step, under the checkpoint before it; PLAN_JSON is the plan of the attempt that ran the step.
The second ranks the documents of a split. Writes progress to standard error and one JSON object to standard output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checkpoint import store
from launcher.child_process import print_result, run_process
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data import triage
from launcher.data.cache_store import read_report
from launcher.data.checks import patterns
from launcher.data.row_layout import RowOrder
from launcher.data.split import DocumentOrigins, Split
from launcher.data.tokenization.encoder import import_tokenizers_without_torch, load_tokenizer
from launcher.errors import LauncherError, RunError, SubmitError
from launcher.evaluate.document_losses import Progress, ScorePass, score_passes, temporary_folder
from launcher.evaluate.weights import find_scored_weights
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking.progress import show_documents

TRAIN = "train"
# Number of documents per list that the page shows with their texts.
_NUM_TEXTS = 100
# Number of tokens from the prompt's end and from the answer's beginning.
_NUM_TOKENS = 80


class _SplitDocuments:
    """Describes the documents of one split."""

    def __init__(self, plan: LaunchPlan, facts: DataFacts, split: Split, is_held_out: bool = False) -> None:
        self._split = split
        self.origins = DocumentOrigins.open(facts.cache_dir, is_held_out)
        self._sources = [source["name"] for source in read_report(facts.cache_dir)["sources"]]
        folder = plan.model.tokenizer_path
        self._tokenizer: Any = load_tokenizer(folder) if folder is not None and Path(folder).is_dir() else None

    def describe(self, document: int) -> dict[str, Any]:
        source = self._sources[int(self._split.columns["source"][document])]
        return {"document": document, "where": self.origins.where(document), "source": source}

    def texts(self, document: int) -> dict[str, str]:
        """Return the end of the prompt and the beginning of the answer, without secrets; empty without the run's tokenizer."""
        if self._tokenizer is None:
            return {"prompt": "", "answer": ""}
        span = slice(*(int(at) for at in self._split.docs[document : document + 2]))
        tokens, trained = self._split.tokens[span], self._split.trained[span]
        begin = int(np.argmax(trained)) if trained.any() else len(tokens)
        parts = (tokens[max(0, begin - _NUM_TOKENS) : begin], tokens[begin : begin + _NUM_TOKENS])
        prompt, text = patterns.redact([self._tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in parts])
        return {"prompt": prompt.strip(), "answer": text.strip()}


def rank_documents(plan_path: Path, step: int | None, split_name: str, on_progress: Progress) -> dict[str, Any]:
    """Score a split's documents with and without their prompts, and return lists of those worth a look."""
    run = RunDir.of_plan(plan_path)
    plan = run_store.load_plan(run)
    held_out = plan.data if plan.data is not None and plan.data.num_eval_rows else None
    splits = {TRAIN: plan.data, HELD_OUT: held_out, **plan.eval_sets}
    if (facts := splits.get(split_name)) is None:
        remedy = f"choose one of: {', '.join(name for name, facts in splits.items() if facts is not None)}"
        raise SubmitError("the run has no such split", where="--split", value=split_name, remedy=remedy)
    weights = find_scored_weights(run, plan, step)
    passes = [ScorePass(title="answers with their prompts", facts=facts, held_out=split_name == HELD_OUT)]
    split = passes[0].open()
    with temporary_folder() as folder:
        alone = triage.write_answers_alone(split, folder, plan.config.data)
        if alone is not None:
            passes.append(ScorePass(title="answers without prompts", facts=alone[0]))
        log_probs = score_passes(plan, weights, passes, on_progress)
        num_tokens, loss = triage.compute_mean_losses(split, log_probs[0])
        loss_alone = np.full(split.num_docs, np.nan)
        if alone is not None:
            loss_alone[alone[1]] = triage.compute_mean_losses(passes[1].open(), log_probs[1])[1]
    documents = _SplitDocuments(plan, facts, split, split_name == HELD_OUT)
    is_likely = triage.compute_explained_shares(loss, loss_alone) <= 0
    lists: dict[str, list[dict[str, Any]]] = {}
    for name, ranked in triage.rank_documents(num_tokens, loss, loss_alone).items():
        # Documents of sources with epochs above 1 are repeated.
        first: dict[bytes, int] = {}
        for document in ranked.tolist():
            first.setdefault(documents.origins.values[document].tobytes(), document)
        lists[name] = [
            {
                **documents.describe(document),
                "rank": rank,
                "content": documents.origins.content_id(document),
                "tokens": int(num_tokens[document]),
                "loss": _round_loss(loss[document]),
                "loss_alone": _round_loss(loss_alone[document]),
                **({"likely": bool(is_likely[document])} if name == triage.MISLABELED else {}),
                **(documents.texts(document) if rank <= _NUM_TEXTS else {}),
            }
            for rank, document in enumerate(first.values(), start=1)
        ]
    return {
        "run": plan.run_name,
        "step": weights.step,
        "split": split_name,
        "documents": split.num_docs,
        "trained_tokens": int(num_tokens.sum()),
        "mean_loss": float(np.nansum(loss * num_tokens) / max(1, num_tokens.sum())),
        "lists": lists,
    }


def _round_loss(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def describe_step(run: RunDir, plan: LaunchPlan, step: int, has_scores: bool, on_progress: Progress) -> dict[str, Any]:
    """Return the documents in the rows of `step`, counted from 1; with `has_scores`, their losses before the step."""
    if plan.data is None:
        raise RunError("the plan has no data", where=str(run.root))
    split, size = Split.open(plan.data), plan.batch.global_batch_size
    lengths = None if plan.config.data.packing else np.diff(split.rows)
    rows = RowOrder(split.num_rows, plan.config.run.seed, lengths, size).at((step - 1) * size, step * size)
    scored_at, reason = None, ""
    losses = np.empty(0)
    if has_scores:
        before = max((one.step for one in store.list_checkpoints(run.checkpoints) if one.step < step), default=0)
        try:
            weights = find_scored_weights(run, plan, before)
        except LauncherError as error:
            reason = f"the checkpoint of step {before} cannot be used: {error.problems[0].message}"
            if not before:
                kept = "checkpoint.keep_last keeps more checkpoints of a run to come"
                reason = f"there is no checkpoint before step {step}, and {error.problems[0].message}; {kept}"
        else:
            one = ScorePass(title="rows of the step", facts=plan.data, rows=tuple(rows.tolist()))
            (log_probs,) = score_passes(plan, weights, [one], on_progress)
            losses = -log_probs
            scored_at = weights.step
    documents, described = _SplitDocuments(plan, plan.data, split), []
    first = 0
    for row in rows.tolist():
        in_row = []
        for document in range(*split.row_docs(row).indices(split.num_docs)):
            begin, end = (int(at) for at in split.docs[document : document + 2])
            num_trained = int(split.columns["num_trained"][document])
            own = losses[first : first + num_trained]
            first += num_trained
            in_row.append(
                documents.describe(document)
                | {
                    "tokens": end - begin,
                    "trained_tokens": num_trained,
                    "loss": _round_loss(own.mean()) if len(own) else None,
                    "max_token_loss": _round_loss(own.max()) if len(own) else None,
                }
                | documents.texts(document)
            )
        described.append({"row": row, "documents": in_row})
    return {"step": step, "scored_at": scored_at, "not_scored": reason, "rows": described}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.evaluate.documents_report")
    parser.add_argument("plan", type=Path, metavar="PLAN_JSON")
    parser.add_argument("--rows-of", type=int, metavar="STEP")
    parser.add_argument("--no-scores", action="store_true")
    parser.add_argument("--step", type=int)
    parser.add_argument("--split", default=TRAIN)
    chosen = parser.parse_args(argv)
    path = chosen.plan.absolute()
    if chosen.no_scores:
        import_tokenizers_without_torch()

    def report() -> dict[str, Any]:
        with show_documents("rows") as on_progress:
            if chosen.rows_of is None:
                return rank_documents(path, chosen.step, chosen.split, on_progress)
            plan, run = LaunchPlan.load(path), RunDir.of_plan(path)
            return describe_step(run, plan, chosen.rows_of, not chosen.no_scores, on_progress)

    return print_result(report)


if __name__ == "__main__":
    run_process(main)
