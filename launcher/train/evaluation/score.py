"""The score pass: the log-probability of every trained token of packed rows, on any number of ranks.

Micro-batches do not depend on the number of ranks, and each is scored by one rank. Ranks commit their scores in shards, so a pass
that is killed continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from launcher.data.loader import RowBatches
from launcher.data.score_store import ScoreStore
from launcher.distributed import RankInfo, all_reduce_step, rank0_broadcast, run_on_all_ranks
from launcher.train.model import CausalLMLoss
from launcher.train.objectives import Objective

_NOT_WRITTEN = "the scores cannot be written"


class Scorer:
    """Computes the losses of single tokens with this rank's engine. All ranks use it together."""

    def __init__(
        self,
        engine: Any,
        model: CausalLMLoss,
        objective: Objective,
        rank_info: RankInfo,
        device: torch.device,
    ) -> None:
        self._engine, self._model, self._objective = engine, model, objective
        self.rank_info, self.device = rank_info, device

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Put the model into evaluation mode within the block."""
        self._model.eval()
        try:
            yield
        finally:
            self._model.train()

    def score(
        self, batches: RowBatches, numbers: Iterable[int], local_stop_reason: Callable[[], str | None]
    ) -> Iterator[torch.Tensor | None]:
        """Yield the loss of each trained token of the micro-batches `numbers`, fp32 [num_labels] on the device. Collective.

        Every rank passes equally many numbers; numbers after the last micro-batch are padding. This calls `local_stop_reason`
        before each micro-batch; if any rank has a reason to stop, it yields None and ends.
        """
        nothing = torch.zeros((), device=self.device)
        for number in numbers:
            # Load it while a GPU still computes the previous one, which the all-reduce waits for.
            micro = batches.load(number)
            if self.device.type == "cuda":
                micro = micro.pin_memory()
            if all_reduce_step(nothing, local_stop_reason(), [], self.device).stop_reason:
                yield None
                return
            yield self._objective.atom_losses(self._engine, micro, self.device)


def score_rows(scorer: Scorer, batches: RowBatches, store: ScoreStore, on_progress: Callable[[int, int], None]) -> None:
    """Write the log-probabilities of all trained tokens of `batches` that `store` lacks into it. Collective.

    `on_progress` is called with the number of scored rows and that of all rows.

    Raises:
        CheckpointError: on every rank, if a rank cannot write.
    """
    rank, world_size, num_rows = scorer.rank_info.rank, scorer.rank_info.world_size, len(batches.rows)
    missing = rank0_broadcast(scorer.rank_info, _NOT_WRITTEN, store.list_missing)
    # Ranks with fewer micro-batches still take part in the passes of the other ranks.
    width = max((len(store.shards[number]) for number in missing), default=0)
    with scorer.without_dropout():
        for first in range(0, len(missing), world_size):
            on_progress((len(store.shards) - len(missing) + first) * num_rows // len(store.shards), num_rows)
            own = missing[first + rank] if first + rank < len(missing) else None
            numbers = [] if own is None else [*store.shards[own]]
            losses = [*scorer.score(batches, [*numbers, *[len(batches)] * (width - len(numbers))], lambda: None)]
            scored = [np.negative(loss.cpu().numpy()) for loss in losses[: len(numbers)] if loss is not None]
            commit = (lambda: None) if own is None else partial(store.commit, own, scored)
            run_on_all_ranks(scorer.device, _NOT_WRITTEN, commit)
    on_progress(num_rows, num_rows)
