"""All ranks together write the export at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked_ranks import RankServer
from safetensors.torch import load_file
from shard_tools import engine_metadata, flip_bit, plan_of, with_metadata

from launcher.checkpoint import store


@pytest.fixture
def checkpoint(runs, tmp_path: Path) -> Path:
    newest = store.get_latest(runs.checkpoints("bf16")).path
    return with_metadata(newest, tmp_path / "checkpoints", engine_metadata(runs.dump("bf16", "saved"), "bf16", 2))


def exported(
    rank_server: RankServer, run: Path, checkpoint: Path, limited: int = -1, push_to_hub: str | None = None
) -> list[tuple[int, str]]:
    """The exit code and output of two ranks that export the checkpoint of `run`."""
    plan = plan_of(run)
    export = plan.config.export.model_copy(update={"push_to_hub": push_to_hub})
    config = plan.config.model_copy(update={"export": export})
    (run / "plan.json").write_text(plan.model_copy(update={"config": config}).to_json())
    arguments = [(str(run / "plan.json"), str(checkpoint), limited)] * 2
    return [(rank.code, rank.output) for rank in rank_server.run("export_ranks:main", arguments, run / "ranks")]


def test_two_ranks_write_one_folder(rank_server, runs, checkpoint, tmp_path):
    (code, output), other = exported(rank_server, tmp_path, checkpoint)
    assert (code, *other) == (0, 0, ""), output + other[1]
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2, "both ranks have something to write"
    weights = {name: tensor for file in files for name, tensor in load_file(tmp_path / "export" / file).items()}
    trained = load_file(runs.dump("bf16", "saved"))
    assert weights.keys() == index["weight_map"].keys()
    assert all((tensor == trained[f"{name}|compute"]).all() for name, tensor in weights.items())
    assert f"export: Hugging Face folder: {tmp_path / 'export'} (bf16; {len(weights)} tensors equal the engine's" in output
    assert "mean KL to the trained model" in output
    assert (tmp_path / "export" / "README.md").is_file()


@pytest.mark.parametrize("limited", [0, 1])
def test_a_failing_rank_fails_the_export_on_all_ranks(rank_server, checkpoint, tmp_path, limited):
    for code, output in exported(rank_server, tmp_path, checkpoint, limited=limited):
        assert code == 3, output
        assert "training is complete and saved, but the Hugging Face folder could not be written" in output
        assert f"rank {limited}, {tmp_path}" in output
        assert f"then: python -m launcher export {tmp_path}" in output
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / ".export.partial").exists()
    assert store.verify(checkpoint) == []


def test_a_wrong_weight_raises_on_all_ranks(rank_server, checkpoint, tmp_path):
    flip_bit(checkpoint, 1, "model.layers.0.mlp.up_proj.weight|fp32", bit=30)
    for code, output in exported(rank_server, tmp_path, checkpoint):
        assert code == 3, output
        assert "differs from the engine's" in output
        assert "model.layers.0.mlp.up_proj.weight, part of rank 1" in output
    assert not (tmp_path / "export").exists()


def test_a_failed_push_is_an_alert_and_keeps_the_folder(rank_server, checkpoint, tmp_path):
    (code, output), _ = exported(rank_server, tmp_path, checkpoint, push_to_hub="owner/name")
    assert code == 0, output
    assert "alert: a push to the Hub needs HF_TOKEN" in output
    assert f"python -m launcher export {tmp_path} --push owner/name" in output
    assert (tmp_path / "export" / "config.json").is_file()
