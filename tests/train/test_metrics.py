from __future__ import annotations

import math
import time
from pathlib import Path

import hand_made
import pytest
import torch

from launcher.data.loader import MicroBatch, StepBatch
from launcher.train.metrics import Meter, StepTimer, perplexity


def test_parts_of_a_step_add_up_and_start_afresh() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.begin()
    for _ in range(2):
        with timer.part("fwd_bwd"):
            time.sleep(0.02)
    times = timer.read()
    assert 0.04 <= times["time/fwd_bwd_s"] <= times["time/step_s"]
    timer.begin()
    assert timer.read().keys() == {"time/step_s"}


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isinf(perplexity(1e6))


def test_each_source_has_its_share_of_the_tokens(tmp_path: Path) -> None:
    settings = {
        "model": {"path": "./model"},
        "data": {"sources": [{"name": "chat", "path": "a.jsonl"}, {"name": "code", "path": "b.jsonl"}]},
        "train": {"max_steps": 40},
    }
    meter = Meter(hand_made.plan(tmp_path, settings), 40, torch.device("cpu"), attempt=1, restart=0)
    micro = MicroBatch(*(torch.zeros(1, 8, dtype=torch.int64),) * 3, row_ids=(0,), num_tokens=8, doc_lengths=(8,))
    batch = StepBatch([micro], num_labels=4, num_tokens=8, source_tokens=(6, 2), row_ids=(0,))
    metrics = meter.step(1, batch, 1.0, 1.0, 1e-5, {"time/step_s": 1.0})
    assert (metrics["data/source/chat/frac"], metrics["data/source/code/frac"]) == (0.75, 0.25)
    assert metrics["data/label_frac"] == pytest.approx(0.5)
