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

# Most micro-batches per shard: each rank of a killed pass recomputes up to this many.
MAX_SHARD_MICRO_BATCHES = 16

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


def score_rows(scorer: Scorer, batches: RowBatches, store: ScoreStore, local_stop_reason: Callable[[], str | None]) -> bool:
    """Write the log-probabilities of all trained tokens of `batches` that `store` lacks into it. Collective.

    Returns whether the store is complete: False if any rank had a reason to stop. A later call does not recompute committed
    shards.

    Raises:
        CheckpointError: on every rank, if a rank cannot write.
    """
    rank_info = scorer.rank_info
    labels = batches.num_labels()
    missing = rank0_broadcast(rank_info, _NOT_WRITTEN, lambda: store.find_missing(labels))
    with scorer.without_dropout():
        for ranges in _list_turns(missing, rank_info.world_size):
            start, stop, width = *ranges[rank_info.rank], max(stop - start for start, stop in ranges)
            # Ranks with fewer micro-batches still take part in the passes of the other ranks.
            numbers = [*range(start, stop), *[len(batches)] * (width - (stop - start))]
            losses = [*scorer.score(batches, numbers, local_stop_reason)]
            if losses and losses[-1] is None:
                return False
            scored = [np.negative(loss.cpu().numpy()) for loss in losses[: stop - start] if loss is not None]
            run_on_all_ranks(scorer.device, _NOT_WRITTEN, partial(store.commit, start, stop, scored))
    rank0_broadcast(rank_info, _NOT_WRITTEN, lambda: store.complete(labels))
    return True


def _list_turns(missing: list[list[int]], world_size: int) -> list[list[tuple[int, int]]]:
    """Divide ranges of micro-batches into turns. In each turn every rank has one range, which may be empty."""
    total = sum(stop - start for start, stop in missing)
    width = max(1, min(MAX_SHARD_MICRO_BATCHES, -(-total // world_size)))
    pieces = [(first, min(first + width, stop)) for start, stop in missing for first in range(start, stop, width)]
    pieces += [(0, 0)] * (-len(pieces) % world_size)
    return [pieces[first : first + world_size] for first in range(0, len(pieces), world_size)]
