from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from launcher.checkpoint import store
from launcher.checkpoint.state import read_state

KINDS = ["fp32", "bf16", "hpz"]


def assert_same_bits(one, other, *, at_least: int = 41) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= at_least
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_continues_bit_for_bit(runs, kind):
    assert_same_bits(runs.dump(kind, "saved"), runs.dump(kind, "loaded"))
    assert_same_bits(runs.dump(kind, "straight"), runs.dump(kind, "resumed"))
    for rank in range(2):
        losses = runs.report(kind, "losses", rank)
        resumed = runs.report(kind, "resumed", rank)
        assert len(set(losses)) == 4
        assert resumed["losses"] == losses[2:]
        assert resumed["extra"] == {"seen": 2}
        assert resumed["step"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_can_load_an_earlier_checkpoint(runs, kind):
    for rank in range(2):
        assert runs.report(kind, "losses-back", rank) == runs.report(kind, "losses", rank)[2:]
        assert runs.report(kind, "losses-again", rank) == runs.report(kind, "losses", rank)[:2]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_another_world_size_loads_the_same_states(runs, kind):
    for name, world_size in (("one", 1), ("two", 2), ("four", 4), ("half", 2)):
        assert_same_bits(runs.dump(kind, "saved"), runs.dump(kind, name))
        assert store.get_at_step(runs.folder / kind / name, 2).manifest.world_size == world_size
        assert len(runs.report(kind, f"{name}-losses", 0)) == 2
    # 2 -> 1 -> 2 and 2 -> 4 -> 2 ranks restore every byte, except the random states of ranks that did not exist in between.
    for way in ("two", "half"):
        first, back = (store.get_at_step(runs.folder / kind / name, 2) for name in ("checkpoints", way))
        for rank in range(2):
            before, after = (load_file(c.path / store.shard_name(rank)) for c in (first, back))
            differing = [
                n for n in before.keys() | after.keys() if not n.startswith("rng|") and not torch.equal(before[n], after[n])
            ]
            assert differing == []


def test_a_small_weight_is_persistent_and_the_others_are_padded(runs):
    """Guards an assumption of these tests: without such weights they would not test padding and persistence."""
    shapes = read_state(store.get_at_step(runs.checkpoints("fp32"), 2).path).parameters
    assert shapes["model.norm.weight"] == (27,)
    assert shapes["lm_head.weight"] == (511, 27)


def test_a_flipped_bit_is_refused_on_all_ranks_before_loading(runs):
    for rank in range(2):
        (damage,) = runs.report("fp32", "resumed", rank)["refused"]
        assert "digest differs" in damage
        assert "rank-00001.safetensors" in damage


def test_a_failing_rank_fails_the_save_on_all_ranks(runs):
    for rank in range(2):
        failures = runs.report("fp32", "failures", rank)
        (disk,) = failures["disk"]
        assert "could not be written" in disk
        assert "rank 1" in disk
        assert "rank-00001.safetensors" in disk
        (space,) = failures["space"]
        assert "needed" in space
        assert "available 1,000 bytes" in space
        assert failures["names"] == ["the named parameters differ from those of the engine's model"]
        (not_json,) = failures["json"]
        assert "rank 0" in not_json
        assert runs.report("fp32", "losses-last", rank) == runs.report("fp32", "losses", rank)[3:]
    assert sorted(p.name for p in runs.checkpoints("fp32").iterdir()) == ["step-00000000", "step-00000002"]


def test_a_killed_save_keeps_the_earlier_checkpoint(runs, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(runs.checkpoints("bf16"), root)
    leftover = root / ".saving-step-00000003-001"
    assert (leftover / "rank-00001.safetensors").stat().st_size > 100_000
    assert store.get_latest(root).step == 2
    store.begin_save(root, step=3, attempt=2, needed_bytes=1)
    assert sorted(p.name for p in root.iterdir()) == [".saving-step-00000003-002", "step-00000000", "step-00000002"]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "hpz"])
def test_a_released_engine_holds_no_memory(runs, kind):
    for rank in range(2):
        released = runs.report(kind, "released", rank)
        assert released["before"] > 100_000
        assert released["after"] == 0


def test_the_directory_holds_exactly_the_files_of_the_manifest(runs):
    checkpoint = store.get_latest(runs.checkpoints("fp32"))
    names = {"rank-00000.safetensors", "rank-00001.safetensors", "state.json", "probe.safetensors"}
    assert checkpoint.manifest.files.keys() == names
    assert {p.name for p in checkpoint.path.iterdir()} == names | {"manifest.json"}
    assert store.verify(checkpoint.path) == []
    saved = runs.report("fp32", "saved", 0)
    assert saved["path"] == str(checkpoint.path)
    assert saved["bytes"] == sum(p.stat().st_size for p in checkpoint.path.iterdir() if p.name != "manifest.json")


def test_the_dynamic_loss_scale_of_fp16_is_restored(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler

    from launcher.checkpoint import zero3

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # only decides which rank logs an overflow

    def engine():
        scaler = loss_scaler.DynamicLossScaler(2.0**16, 2, 1.0, delayed_shift=2, consecutive_hysteresis=False)
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))

    saved, loaded = engine(), engine()
    for overflow in (False, True, False, True):
        saved.optimizer.loss_scaler.update_scale(overflow)
    state = zero3.loss_scale_state(saved)
    assert state["cur_scale"] == 2.0**15
    zero3.set_loss_scale_state(loaded, json.loads(json.dumps(state)))
    for overflow in (False, False, False, False, True, False):
        for one in (saved, loaded):
            one.optimizer.loss_scaler.update_scale(overflow)
        assert vars(loaded.optimizer.loss_scaler) == vars(saved.optimizer.loss_scaler)


@pytest.mark.rest
@pytest.mark.timeout(1500)  # includes compiling extensions
def test_the_compiled_cpu_adam_continues_bit_for_bit(offload_runs):
    assert_same_bits(offload_runs.dump("offload", "straight"), offload_runs.dump("offload", "resumed"))
    for rank in range(2):
        assert offload_runs.report("offload", "losses-back", rank) == offload_runs.report("offload", "losses", rank)[2:]


NVME_KINDS = ["nvme", "nvme_params"]


@pytest.mark.rest
@pytest.mark.timeout(1500)  # includes compiling extensions
@pytest.mark.parametrize("kind", NVME_KINDS)
def test_states_are_offloaded_to_nvme(nvme_runs, kind):
    """Guards an assumption of the tests below. The norms' sub-group is too small for DeepSpeed to swap."""
    for rank in range(2):
        found = nvme_runs.report(kind, "on-nvme", rank)
        assert (found["sub_groups"], found["of"]) == (4, 5)
        assert found["weights"] == (3 if kind == "nvme_params" else 0)


@pytest.mark.rest
@pytest.mark.timeout(1500)  # includes compiling extensions
@pytest.mark.parametrize("kind", NVME_KINDS)
def test_states_on_nvme_continue_bit_for_bit_after_a_resume_and_after_loading_an_earlier_checkpoint(nvme_runs, kind):
    assert_same_bits(nvme_runs.dump(kind, "saved"), nvme_runs.dump(kind, "loaded"), at_least=30)
    assert_same_bits(nvme_runs.dump(kind, "straight"), nvme_runs.dump(kind, "resumed"), at_least=30)
    for rank in range(2):
        losses = nvme_runs.report(kind, "losses", rank)
        assert len(set(losses)) == 4
        assert nvme_runs.report(kind, "resumed", rank)["losses"] == losses[2:]
        assert nvme_runs.report(kind, "losses-back", rank) == losses[2:]
        assert nvme_runs.report(kind, "losses-again", rank) == losses[:2]


@pytest.mark.rest
@pytest.mark.timeout(1500)  # includes compiling extensions
@pytest.mark.parametrize("kind", NVME_KINDS)
def test_states_on_nvme_move_to_another_world_size_and_back(nvme_runs, kind):
    assert_same_bits(nvme_runs.dump(kind, "saved"), nvme_runs.dump(kind, "one"), at_least=30)
    assert_same_bits(nvme_runs.dump(kind, "saved"), nvme_runs.dump(kind, "two"), at_least=30)


@pytest.mark.rest
@pytest.mark.timeout(1500)  # includes compiling extensions
@pytest.mark.parametrize("kind", NVME_KINDS)
def test_a_failed_save_from_nvme_does_not_affect_training(nvme_runs, kind):
    for rank in range(2):
        (disk,) = nvme_runs.report(kind, "failures", rank)["disk"]
        assert "rank-00001.safetensors" in disk
        assert nvme_runs.report(kind, "losses-last", rank) == nvme_runs.report(kind, "losses", rank)[3:]


@pytest.mark.rest
@pytest.mark.timeout(1500)  # includes compiling extensions
@pytest.mark.parametrize("kind", NVME_KINDS)
def test_training_waits_for_a_save_from_nvme(nvme_runs, kind):
    assert [nvme_runs.report(kind, "waited", rank) for rank in range(2)] == [{"is_there": True}] * 2
