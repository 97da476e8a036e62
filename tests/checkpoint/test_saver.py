"""Background saves: what they contain, what they cost, and what a fault at any point leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from launcher import hardware
from launcher.checkpoint import store
from launcher.checkpoint.safetensors_io import TensorFile, as_bytes, weight_digest

# Includes the runs that these tests need, possibly while other tests compile extensions.
pytestmark = pytest.mark.timeout(900)
# Where a save is interrupted, and which rank is killed there; only rank 0 reaches the last three points.
KILLS = [
    *(("begun", "1"), ("copied", "0"), ("half-written", "0"), ("half-written", "1"), ("half-written", "all")),
    *(("noted", "0"), ("noted", "1"), ("gathered", "0"), ("manifest", "0"), ("committed", "0")),
]
UNCOMMITTED = [".saving-step-00000003-001", "step-00000002"]
COMMITTED = ["step-00000002", "step-00000003"]
GIB = 2**30


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_background_save_holds_the_state_of_its_step(runs, kind):
    waited, behind = (store.get_at_step(runs.folder / kind / name, 2) for name in ("checkpoints", "behind"))
    for rank in range(2):
        assert runs.report(kind, "behind", rank)["losses"] == runs.report(kind, "losses", rank)[:3]
        ours, theirs = (load_file(c.path / store.shard_name(rank)) for c in (behind, waited))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert store.verify(behind.path) == []


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_training_does_not_wait_for_the_write(runs, kind):
    """The write is delayed by half a second, and the next step completes meanwhile."""
    assert runs.report(kind, "behind-early", 0) == {"is_there": False, "known": False}
    for rank in range(2):
        times = runs.report(kind, "behind", rank)
        assert times["seconds"] > 0.5
        assert times["stall_s"] < times["seconds"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_all_ranks_report_the_same_duration_of_a_save(runs, kind):
    """All ranks use this number to decide together whether another save fits before the machines go away."""
    took = {runs.report(kind, "behind", rank)["seconds"] for rank in range(2)}
    assert len(took) == 1


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_failed_background_write_raises_on_all_ranks_and_leaves_nothing(runs, kind):
    for rank in range(2):
        (failure,) = runs.report(kind, "behind", rank)["failures"]
        assert "could not be written" in failure
        assert "rank 1" in failure
    assert sorted(path.name for path in (runs.folder / kind / "behind").iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_failed_prune_does_not_undo_the_commit(runs, kind):
    assert runs.report(kind, "unremovable", 0) == f"Permission denied: {runs.folder / kind / 'older'}"
    assert runs.report(kind, "unremovable", 1) == ""
    assert store.verify(store.get_at_step(runs.folder / kind / "unremovable", 4).path) == []


def test_non_finite_weights_are_never_committed(runs):
    for rank in range(2):
        (failure,) = runs.report("bf16", "behind-poisoned", rank)
        assert "NaN" in failure


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_shard_holds_digests_of_the_compute_weights(runs, kind):
    checkpoint = store.get_at_step(runs.checkpoints(kind), 2)
    weights = load_file(runs.dump(kind, "saved"))
    for rank in range(2):
        shard = TensorFile(checkpoint.path / store.shard_name(rank))
        shard.close()
        assert shard.metadata["dtype"] == kind
        for name, digest in json.loads(shard.metadata["weights"]).items():
            whole = weights[f"{name}|compute"].reshape(-1)
            start, stop = store.partition(whole.numel(), 2, rank)
            assert weight_digest(as_bytes(whole[start:stop])) == digest, name


@pytest.fixture(scope="module")
def killed(run_ranks, tmp_path_factory) -> Path:
    """Kill a save at each of KILLS; then let new ranks resume from what is left."""
    root = tmp_path_factory.mktemp("killed")
    left = {}
    for point, victim in KILLS:
        name = f"{point}-{victim}"
        run_ranks("points", 2, root, name, killed=[0, 1] if victim == "all" else [int(victim)], VICTIM=victim, POINT=point)
        left[name] = sorted(path.name for path in (root / name / "checkpoints").iterdir())
    (root / "left.json").write_text(json.dumps(left))
    run_ranks("after", 2, root, ",".join(left))
    return root


@pytest.mark.parametrize("point, victim", KILLS)
def test_a_kill_at_any_point_of_a_save_leaves_an_intact_checkpoint_to_resume_from(runs, killed, point, victim):
    name = f"{point}-{victim}"
    left = json.loads((killed / "left.json").read_text())[name]
    if (point, victim) == ("noted", "1"):
        # Everything is written: rank 0 commits unless it dies too soon after rank 1.
        assert left in (UNCOMMITTED, COMMITTED)
    else:
        assert left == (COMMITTED if point == "committed" else UNCOMMITTED)
    begins = 3 if left == COMMITTED else 2
    for rank in range(2):
        after = json.loads((killed / name / f"after-{rank}.json").read_text())
        assert after == {"from": begins, "losses": runs.report("bf16", "losses", rank)[begins:]}
    swept = sorted(path.name for path in (killed / name / "checkpoints").iterdir())
    assert swept == [name for name in left if name.startswith("step-")] + ["step-00000004"]
    assert store.verify(killed / name / "checkpoints/step-00000004") == []


@pytest.mark.parametrize(
    ("files", "left_gib"),
    [
        ({}, 100),
        ({"job/memory.max": "max", "job/memory.current": "5"}, 100),
        ({"job/memory.max": 40 * GIB, "job/memory.current": 30 * GIB, "job/memory.stat": "anon 1\nfile 2\n"}, 10),
        # After a model is read or a checkpoint written, the page cache fills the rest of a job's memory.
        (
            {
                "job/memory.max": 40 * GIB,
                "job/memory.current": 39 * GIB,
                "job/memory.stat": f"anon 1\ninactive_file {29 * GIB}\n",
            },
            30,
        ),
        ({"memory.max": 20 * GIB, "memory.current": 15 * GIB, "memory.stat": "", "job/memory.max": "max"}, 5),
    ],
)
def test_available_memory_respects_limits_of_all_cgroups(tmp_path, monkeypatch, files, left_gib):
    free = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    (tmp_path / "own").write_text("0::/job/step_0\n")
    (tmp_path / "job" / "step_0").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_text(str(content))
    monkeypatch.setattr(hardware, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    assert hardware.available_bytes() == left_gib * GIB
