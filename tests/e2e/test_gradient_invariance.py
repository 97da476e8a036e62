"""One global batch, split over ranks and accumulation, activations kept or recomputed: the same loss and parameters."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_tools import TINY, losses
from safetensors.torch import load_file

pytestmark = pytest.mark.rest

SPLITS = {"1x4": (1, "false"), "2x2": (2, "false"), "4x1": (4, "false"), "recomputed": (2, "true")}


def assembled(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, put together from its shards."""
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    shards = [load_file(file) for file in sorted(checkpoint.glob("rank-*.safetensors"))]
    names = [name for name in shards[0] if "|" in name and not name.startswith("rng")]
    return {name: torch.cat([shard[name].reshape(-1) for shard in shards if name in shard]) for name in names}


def test_loss_and_parameters_do_not_depend_on_how_they_are_computed(
    launch: Callable[..., subprocess.CompletedProcess[str]], module_runs: Path
) -> None:
    for name, (ranks, recompute) in SPLITS.items():
        done = launch(
            *TINY,
            "model.dtype=fp32",
            "train.max_steps=2",
            "train.micro_batch_size=1",
            f"cluster.ranks_per_node={ranks}",
            f"model.activation_checkpointing={recompute}",
            "train.export=false",
            "optim.warmup_steps=0",
            "optim.eps=1e-4",
            f"run.root={module_runs}",
            f"run.name={name}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
    reference, reference_losses = assembled(module_runs / "1x4"), losses(module_runs / "1x4")
    assert any(tensor.abs().max() > 0 for name, tensor in reference.items() if name.endswith("|exp_avg"))
    for name in ("2x2", "4x1", "recomputed"):
        found, found_losses = assembled(module_runs / name), losses(module_runs / name)
        assert found.keys() == reference.keys()
        assert found_losses == pytest.approx(reference_losses, rel=1e-6)
        for key, tensor in reference.items():
            # exp_avg is a sum of gradients: comparing it is comparing them.
            torch.testing.assert_close(
                found[key], tensor, rtol=1e-4, atol=1e-7, msg=lambda text, key=key, name=name: f"{name} {key}: {text}"
            )
