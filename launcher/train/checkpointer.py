"""The loop's interface to checkpoints: starts saves, waits for them, and reports their outcomes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.manifest import HELD_OUT, LaterEvaluation, record_evaluation
from launcher.checkpoint.saver import Saved, Saver
from launcher.data.cache_dir import mark_used
from launcher.data.split import Split
from launcher.errors import CheckpointError, LauncherError, Superseded
from launcher.plan.checkpoints import REFERENCE_TOKENS
from launcher.plan.quantities import format_size
from launcher.tracking.progress import EVENT, Pace, report_elapsed_time
from launcher.tracking.tracker import Composite
from launcher.train.model import CausalLMLoss


class Checkpointer:
    """Saves through a `Saver` and reports outcomes on rank 0.

    `saved_step` and `save_s` are the step and the duration, in seconds, of the last save that all ranks know of. `stall_s` is the
    time, in seconds, that training has waited for the saves reported so far, on rank 0.
    """

    def __init__(
        self,
        saver: Saver,
        tracker: Composite,
        is_main: bool,
        beat: Callable[[str, int], None],
        eval_set: str = HELD_OUT,
        eval_rows: str = "",
        data_cache: str = "",
    ) -> None:
        """`eval_set` names the evaluation set whose losses are passed to `save`, `eval_rows` is the digest of its rows.

        `data_cache` is the folder of the rows, which each save marks as used.
        """
        self._saver, self._tracker, self._is_main, self._beat = saver, tracker, is_main, beat
        self._eval_set, self._eval_rows, self._data_cache = eval_set, eval_rows, data_cache
        self._is_unreported, self._saving_step, self._is_run_complete = False, 0, False
        self._eval_loss: float | None = None
        self.stall_s = 0.0
        self.saved_step: int | None = None
        self.save_s: float | None = None
        self.wait_for_staging: Callable[[], None] = saver.wait_for_staging
        self.drain: Callable[[float], None] = saver.drain
        self.close: Callable[[], None] = saver.close

    def save(self, step: int, state: Mapping[str, Any], eval_loss: float | None) -> None:
        """Begin a save, in the background where possible; its outcome is reported as soon as it is known. Collective."""
        self._begin(step, state, eval_loss)
        if not self._saver.is_saving:
            self.wait(step)

    def save_and_wait(
        self,
        step: int,
        state: Mapping[str, Any],
        eval_loss: float | None,
        reference_logits: Mapping[str, torch.Tensor],
        is_run_complete: bool = False,
    ) -> None:
        """Save, and return once the checkpoint is committed. If the run is complete, no later one needs room. Collective.

        Raises:
            CheckpointError: if the save failed; committed checkpoints stay.
        """
        self._begin(step, state, eval_loss, reference_logits=reference_logits, wait=True)
        self._is_run_complete = is_run_complete
        outcome = self.wait(step)
        if isinstance(outcome, CheckpointError):
            raise outcome

    def _begin(self, step: int, state: Mapping[str, Any], eval_loss: float | None, **options: Any) -> None:
        self.wait(step)
        self._is_unreported, self._eval_loss, self._saving_step = True, eval_loss, step
        with self._show_waiting():
            self._saver.save(step, state, eval_loss=eval_loss, **options)

    def wait(self, step: int) -> Saved | CheckpointError | None:
        """Wait for the in-flight save and return its outcome; a failed one is reported, and training continues. Collective."""
        # Otherwise the watchdog would take this wait for a stalled step.
        self._beat("saving", step)
        with self._show_waiting():
            outcome = self._saver.wait()
        if isinstance(outcome, Saved):
            self.saved_step, self.save_s = outcome.step, outcome.seconds
        self._report(outcome, step)
        return outcome

    def _show_waiting(self) -> AbstractContextManager[None]:
        """Say on rank 0 how long training has waited for a save."""
        if not self._is_main or not self._is_unreported:
            return nullcontext()
        return report_elapsed_time(f"saving step {self._saving_step}", partial(self._tracker.event, EVENT), Pace())

    def poll(self, step: int) -> None:
        """Report the outcome of the in-flight save if it is known. Does not wait.

        Raises:
            Superseded: if another attempt has taken over the run.
        """
        self._report(self._saver.poll(), step)

    def record_evaluation(self, path: Path, loss: float) -> None:
        """Record the loss of the committed checkpoint at `path`, which was saved without one, on rank 0."""
        step = self.saved_step
        if not self._is_main or step is None:
            return
        try:
            is_recorded = record_evaluation(path, LaterEvaluation(self._eval_set, loss, self._eval_rows))
        except (OSError, CheckpointError) as error:
            self._tracker.event("alert", f"the loss of a checkpoint could not be recorded: {error}", step)
            return
        if is_recorded:
            fields = {"path": str(path), "saved_step": step, "eval_loss": loss, "eval_set": self._eval_set}
            self._tracker.event("checkpoint", f"evaluated {path}", step, **fields)

    def _report(self, outcome: Saved | LauncherError | None, step: int) -> None:
        if outcome is None or not self._is_main or not self._is_unreported:
            return
        self._is_unreported = False
        if isinstance(outcome, Superseded):
            raise outcome
        if isinstance(outcome, LauncherError):
            problems = outcome.problems
            reason = "; ".join(f"{p.message} ({': '.join(filter(None, (p.where, p.value)))})" for p in problems)
            # The text before the colon differs for each step, so the rate limit does not suppress this alert.
            self._tracker.event("alert", f"step {self._saving_step} was not saved: {reason}", step)
            return
        self.stall_s += outcome.stall_s
        if self._data_cache:
            # `clean` may not know of the folder of this run.
            mark_used(Path(self._data_cache))
        free: int | None = None
        # That it cannot be read is no reason to stop training.
        with suppress(OSError):
            free = shutil.disk_usage(outcome.path.parent).free
        self._tracker.log(
            step,
            {
                "ckpt/last_step": outcome.step,
                "ckpt/save_s": outcome.seconds,
                "ckpt/stall_s": outcome.stall_s,
                "time/ckpt_s": outcome.stall_s,
                "ckpt/bytes": outcome.bytes,
                **({} if free is None else {"ckpt/disk_free_gib": free / 2**30}),
            },
        )
        if free is not None and free < outcome.bytes and not self._is_run_complete:
            sizes = f"{format_size(free)} are free, and it needs {format_size(outcome.bytes)}"
            self._tracker.event("alert", f"the disk has no room for the next checkpoint: {sizes}", step)
        if outcome.not_pruned:
            self._tracker.event("alert", f"old checkpoints could not be deleted: {outcome.not_pruned}", step)
        size = f"{format_size(outcome.bytes)} in {outcome.seconds:.1f} s, training waited {outcome.stall_s:.2f} s"
        fields = {"path": str(outcome.path), "saved_step": outcome.step, "eval_loss": self._eval_loss, "eval_set": self._eval_set}
        self._tracker.event("checkpoint", f"saved {outcome.path} ({size})", step, **fields)


@torch.no_grad()
def compute_reference_logits(engine: Any, model: CausalLMLoss, split: Split, device: torch.device) -> dict[str, torch.Tensor]:
    """Compute logits of the first tokens of the first row, to compare an export with. Collective.

    Returns `input_ids` [1, T], `position_ids` [1, T] and `logits` [1, T, V], on the CPU.
    """
    # Only these tokens: they lie in the block that was verified when the split was opened, so reading them cannot fail.
    row = torch.from_numpy(split.tokens[: min(split.rows[1], REFERENCE_TOKENS)].astype("int64"))[None]
    positions = torch.arange(row.shape[1])[None]
    model.eval()
    logits = engine(row.to(device), positions.to(device))
    model.train()
    return {"input_ids": row, "position_ids": positions, "logits": logits.reshape(1, row.shape[1], -1).cpu()}
