"""What a rank does where weights are missing or have another shape, which the submit side should have refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weight_tools import change_weights, save_model, without

from launcher.config.schema import ModelSection
from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts
from launcher.train.model import build_model

SCRIPT = Path(__file__).with_name("weight_ranks.py")
DEADLINE_S = 120


def test_a_model_is_not_built_from_a_part_of_its_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "llama"})
    config = json.loads((folder / "config.json").read_text())
    facts = model_facts(config, str(folder), None, None)
    change_weights(folder, without("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"lack 1 tensor of the model: model\.norm\.weight"):
        build_model(ModelSection(path=str(folder)), facts, "cpu", chunk_tokens=64)
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}))
    build_model(ModelSection(path=str(folder)), facts, "cpu", chunk_tokens=64)


def built(tmp_path: Path, *folders: Path) -> list[list[str | None]]:
    """What each of two ranks says of each folder."""
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "RENDEZVOUS": str(tmp_path / "rendezvous"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    ranks = []
    try:
        for rank in range(2):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(tmp_path / f"{rank}.err", "w") as errors:
                command = [sys.executable, str(SCRIPT), *map(str, folders)]
                ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True))
        deadline = time.monotonic() + DEADLINE_S
        outputs = [rank.communicate(timeout=max(0.0, deadline - time.monotonic()))[0] for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait(timeout=10)
    assert [rank.returncode for rank in ranks] == [0, 0], (tmp_path / "0.err").read_text()[-3000:]
    return [[json.loads(line) for line in output.splitlines() if line.startswith(('"', "null"))] for output in outputs]


@pytest.mark.rest
def test_ranks_under_zero3_refuse_weights_that_do_not_cover_the_model(tmp_path: Path) -> None:
    whole = save_model(tmp_path / "whole", {"model_type": "llama", "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(whole / "model.safetensors")
    fused = save_model(tmp_path / "fused", {"model_type": "mixtral"})
    lacking = save_model(tmp_path / "lacking", {"model_type": "llama"})
    change_weights(lacking, without("model.norm.weight"))
    expert = save_model(tmp_path / "expert", {"model_type": "mixtral"})
    change_weights(expert, without("model.layers.1.block_sparse_moe.experts.1.w1.weight"))
    shape = save_model(tmp_path / "shape", {"model_type": "llama"})
    change_weights(shape, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    first, second = built(tmp_path, whole, fused, lacking, expert, shape)
    for said in (first, second):
        assert said[:3] == [None, None, "model.path: the weight files lack 1 tensor of the model: model.norm.weight"]
        assert "Failed to apply weight conversion for 'model.layers.1.mlp.experts.gate_up_proj'" in str(said[3])
    # Shapes are compared by rank 0 alone, whose end is the end of the run.
    assert "the weight files do not fit the model: size mismatch for model.norm.weight" in str(first[4])
