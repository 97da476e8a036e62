"""A loss computed after its checkpoint was saved reaches the mirror, and affects which checkpoints the mirror keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

from mirror_tools import begun, commit, elsewhere, finished_files, make_run, send_all, steps_in, tree

from launcher.checkpoint import store
from launcher.checkpoint.manifest import HELD_OUT, LaterEvaluation, record_evaluation


def test_a_loss_that_was_computed_after_the_save_counts_where_only_the_mirror_has_the_checkpoint(tmp_path: Path) -> None:
    settings = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=settings)
    folder = tmp_path / "mirror" / "a"
    for step, loss in ((5, 2.0), (10, None), (15, 3.0)):
        commit(run, step, loss=loss)
    mirror = begun(plan, run)
    # Saved without a loss, as when a preemption skips the evaluation.
    later = run.checkpoints / store.step_name(10)
    assert record_evaluation(later, LaterEvaluation(HELD_OUT, 1.0))
    for checkpoint in mirror.behind():
        mirror.send(checkpoint)
    for _ in range(2):
        with finished_files() as names:
            mirror.send_evaluations()
    assert names == [], "it is sent once"
    assert tree(folder / "checkpoints" / later.name) == tree(later)
    # The next machine has fetched only the newest checkpoint.
    assert begun(plan, elsewhere(tmp_path, run, 15), attempt=2).prune() == [5]
    assert steps_in(folder) == [10, 15]


def test_another_checkpoint_of_the_step_does_not_have_the_loss_of_the_first(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror")
    folder = tmp_path / "mirror" / "a"
    first = commit(run, 5)
    mirror = begun(plan, run)
    record_evaluation(first.path, LaterEvaluation(HELD_OUT, 1.0))
    send_all(mirror)
    mirror.send_evaluations()
    shutil.rmtree(first.path)
    other = commit(run, 5, b"others")
    send_all(mirror)
    mirror.send_evaluations()
    assert tree(folder / "checkpoints" / other.path.name) == tree(other.path)
