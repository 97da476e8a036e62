"""The run's checkpoints as the loop sees them: when one was saved, how long it took, and who is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.saver import Saved, Saver
from launcher.data.cache import Split
from launcher.errors import CheckpointError, LauncherError, Superseded
from launcher.tracking.tracker import Composite
from launcher.train.model import CausalLMLoss

# Tokens whose logits stand in each checkpoint, for the export's parity check.
_REFERENCE_TOKENS = 64


class Checkpoints:
    """Saves by way of a `Saver`. `saved_step` and `save_s` are those of the last save that all ranks know of.

    `stall_s` is what training has waited for saves so far, as rank 0 has told it.
    """

    def __init__(self, saver: Saver, tracker: Composite, is_main: bool, beat: Callable[[str, int], None]) -> None:
        self._saver, self._tracker, self._is_main, self._beat = saver, tracker, is_main, beat
        self._untold, self._saving = False, 0
        self._eval_loss: float | None = None
        self.stall_s = 0.0
        self.saved_step: int | None = None
        self.save_s: float | None = None
        self.wait_for_staging: Callable[[], None] = saver.wait_for_staging
        self.drain: Callable[[float], None] = saver.drain
        self.close: Callable[[], None] = saver.close

    def save(self, step: int, state: Mapping[str, Any], eval_loss: float | None) -> None:
        """Save, in the background where that can be; how it ended is told as soon as it is known. Collective."""
        self.wait(step)
        self._untold, self._eval_loss, self._saving = True, eval_loss, step
        self._saver.save(step, state, eval_loss=eval_loss)
        if not self._saver.is_saving:
            self.wait(step)

    def save_and_wait(
        self, step: int, state: Mapping[str, Any], eval_loss: float | None, reference_logits: Mapping[str, torch.Tensor]
    ) -> None:
        """Save, and return when the checkpoint is committed. Collective.

        Raises:
            CheckpointError: where it could not be saved; what was committed before stays.
        """
        self.wait(step)
        self._untold, self._eval_loss, self._saving = True, eval_loss, step
        self._saver.save(step, state, eval_loss=eval_loss, reference_logits=reference_logits, wait=True)
        outcome = self.wait(step)
        if isinstance(outcome, CheckpointError):
            raise outcome

    def wait(self, step: int) -> Saved | CheckpointError | None:
        """Wait for the save in the background. One that failed is told, and training goes on. Collective."""
        # To wait for a save is no step that does not come: those who watch are told before.
        self._beat("saving", step)
        outcome = self._saver.wait()
        if isinstance(outcome, Saved):
            self.saved_step, self.save_s = outcome.step, outcome.seconds
        self._tell(outcome, step)
        return outcome

    def poll(self, step: int) -> None:
        """Tell how the save in the background ended, as soon as that is known. Waits for nothing.

        Raises:
            Superseded: where another attempt has taken over meanwhile.
        """
        self._tell(self._saver.poll(), step)

    def _tell(self, outcome: Saved | LauncherError | None, step: int) -> None:
        if outcome is None or not self._is_main or not self._untold:
            return
        self._untold = False
        if isinstance(outcome, Superseded):
            raise outcome
        if isinstance(outcome, LauncherError):
            problems = outcome.problems
            why = "; ".join(f"{p.what} ({': '.join(filter(None, (p.where, p.value)))})" for p in problems)
            # Each is told: what stands before the colon is another one.
            self._tracker.event("alert", f"step {self._saving} was not saved: {why}", step)
            return
        self.stall_s += outcome.stall_s
        free = _free_bytes(outcome.path.parent)
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
        if free is not None and free < outcome.bytes:
            room = f"{free / 2**30:.2f} GiB are free, and it takes {outcome.bytes / 2**30:.2f} GiB"
            self._tracker.event("alert", f"the disk has no room for the next checkpoint: {room}", step)
        if outcome.not_pruned:
            self._tracker.event("alert", f"older checkpoints could not be removed: {outcome.not_pruned}", step)
        size = f"{outcome.bytes / 2**30:.2f} GiB in {outcome.seconds:.1f} s, training stood still for {outcome.stall_s:.2f} s"
        named = {"path": str(outcome.path), "saved_step": outcome.step, "eval_loss": self._eval_loss}
        self._tracker.event("checkpoint", f"saved {outcome.path} ({size})", step, **named)


def _free_bytes(folder: Path) -> int | None:
    """None where storage does not tell now: what it says to one who asks for a number is no reason to stop training."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


@torch.no_grad()
def reference_logits(engine: Any, model: CausalLMLoss, split: Split, device: torch.device) -> dict[str, torch.Tensor]:
    """Logits of a few tokens of the first row, by which an export proves that it is this model. Collective."""
    # Not the whole row: these tokens are in the block that was verified when the split was opened, so no save fails for them.
    row = torch.from_numpy(split.tokens[: min(split.rows[1], _REFERENCE_TOKENS)].astype("int64"))[None]
    positions = torch.arange(row.shape[1])[None]
    model.eval()
    logits = engine(row.to(device), positions.to(device))
    model.train()
    return {"input_ids": row, "position_ids": positions, "logits": logits.reshape(1, row.shape[1], -1).cpu()}
