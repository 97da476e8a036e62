"""Rows per second of the score pass, compared with a plain transformers loop over the same packed rows without gradients.

    python benchmarks/score.py [--rows N] [--rounds N] [overrides of the launcher]

Both sides score the first N training rows of the demonstration data with the demonstration model in fp32, on one rank, in the
same micro-batches. The launcher uses its ZeRO-3 engine and a store on disk; the other side applies log_softmax to the logits of
all tokens. They take turns, and their log-probabilities are compared. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import deepspeed
import numpy as np
import sides
import torch
from transformers import AutoModelForCausalLM

from launcher.data.loader import IGNORED, RowBatches
from launcher.data.split import Split
from launcher.distributed import RankInfo
from launcher.evaluate.document_losses import ScoreStore, score_rows
from launcher.train.engine import build_engine
from launcher.train.held_out_loss import Scorer
from launcher.train.objectives import SupervisedNll

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "model.dtype=fp32", "train.global_batch_size=4", "train.micro_batch_size=4"),
    *("cluster.ranks_per_node=1", "tracking=none"),
)
PLAIN, LAUNCHER = "plain transformers", "score pass"


def main() -> None:
    arguments = sides.parser(__doc__, rounds=5)
    arguments.add_argument("--rows", type=int, default=32)
    args, overrides = arguments.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        prepared = sides.prepare(folder, [*SETTINGS, *overrides], steps=1, warmup=0)
        plan = prepared.plan
        assert plan.data is not None
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        deepspeed.init_distributed(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1, auto_mpi_discovery=False, verbose=False
        )
        plain = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32, attn_implementation="sdpa").eval()
        engine, model = build_engine(plan, RankInfo(0, 0, 1, 1))
        batches = RowBatches(Split.open(plan.data), plan.batch.micro_batch_size, pad_id=0, rows=np.arange(args.rows))
        alone = plan.topology.model_copy(update={"world_size": 1})
        scorer = Scorer(engine, model, SupervisedNll(), RankInfo(0, 0, 1, 1), torch.device("cpu"), alone)
        rates: dict[str, list[float]] = {PLAIN: [], LAUNCHER: []}
        largest_difference = 0.0
        # The first round is a warm-up for both sides.
        for number in range(args.rounds + 1):
            store = ScoreStore("benchmark", len(batches), folder / f"round-{number}")
            began = time.perf_counter()
            expected = _score_plainly(plain, batches)
            between = time.perf_counter()
            score_rows(scorer, batches, store, lambda done, total: None)
            ended = time.perf_counter()
            scores = store.read()
            largest_difference = max(largest_difference, float(np.abs(scores - expected).max()))
            if number:
                rates[PLAIN].append(args.rows / (between - began))
                rates[LAUNCHER].append(args.rows / (ended - between))
                print(f"round {number}: plain {rates[PLAIN][-1]:.2f}, score pass {rates[LAUNCHER][-1]:.2f} rows/s", flush=True)
    trained = (
        batches.split.columns["num_trained"][batches.split.docs_of(batches.rows)].sum()
        / batches.split.row_lengths(batches.rows).sum()
    )
    note = f"{trained:.0%} of the tokens are trained; log-probabilities differ by at most {largest_difference:.1e}."
    command = sides.typed("score.py", "--rows", args.rows, "--rounds", args.rounds, *overrides)
    title = f"score pass, {args.rows} rows of up to {plan.config.data.max_length:,} tokens"
    source = "From `launcher.evaluate.document_losses.score_rows`, called from Python."
    sides.record(args.results, "score pass", title, source, command, [*_table(rates), "", note])


@torch.no_grad()
def _score_plainly(model: torch.nn.Module, batches: RowBatches) -> np.ndarray:
    """Return the log-probabilities of the trained tokens from plain transformers."""
    scores = []
    for number in range(len(batches)):
        micro = batches.load(number)
        log_probs = model(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits.log_softmax(-1)
        labels = micro.labels.clamp(min=0)
        scores.append(log_probs.gather(-1, labels[..., None]).squeeze(-1)[micro.labels != IGNORED].numpy())
    return np.concatenate(scores)


def _table(rates: dict[str, list[float]]) -> list[str]:
    """Return a Markdown table: medians over rounds, and the ratio of paired rounds."""
    pairs = [ours / theirs for ours, theirs in zip(rates[LAUNCHER], rates[PLAIN], strict=True)]
    lines = ["| side | rows/s | range |", "|---|---|---|"]
    lines += [f"| {side} | {statistics.median(r):.2f} | {min(r):.2f} to {max(r):.2f} |" for side, r in rates.items()]
    ratio = f"{statistics.median(pairs):.2f} | {min(pairs):.2f} to {max(pairs):.2f}"
    return [*lines, f"| {LAUNCHER} / {PLAIN}, pairs | {ratio} |"]


if __name__ == "__main__":
    main()
