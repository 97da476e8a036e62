"""A whole plan made by hand, and W&B without a login or a network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import RunConfig
from launcher.plan.launch_plan import Batch, LaunchPlan, Limits, Memory, ModelFacts, Provenance, Saving, Topology


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def make_plan(run_dir: Path) -> Callable[..., LaunchPlan]:
    """Makes a plan for `run_dir` from the settings of tracking.*."""
    return functools.partial(_plan, run_dir)


@pytest.fixture(autouse=True)
def no_wandb_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _plan(run_dir: Path, **tracking: Any) -> LaunchPlan:
    config = RunConfig.model_validate(
        {
            "model": {"path": "./model"},
            "data": {"sources": [{"path": "train.jsonl"}]},
            "train": {"max_steps": 40},
            "tracking": tracking,
        }
    )
    return LaunchPlan(
        run_name="demo-run",
        run_dir=str(run_dir),
        wandb_id="abcd1234",
        config=config,
        topology=Topology(nodes=1, ranks_per_node=2, world_size=2, device="cpu", backend="gloo"),
        batch=Batch(
            global_batch_size=8,
            micro_batch_size=2,
            accumulation=2,
            max_tokens_per_step=2048,
            tokens_per_step=2000,
            max_steps=40,
            epochs=None,
        ),
        deepspeed={"zero_optimization": {"stage": 3}},
        memory=Memory(
            weights_gib=0.3, gradients_gib=0.3, optimizer_gib=1.5, per_rank_gib=1.0, host_per_node_gib=0.0, device_gib=None
        ),
        checkpoint_bytes=10,
        saving=Saving(background=False, host_gib_per_node=0.0),
        limits=Limits(max_seconds=None),
        model=ModelFacts(
            path=None,
            tokenizer_path=None,
            num_params=1,
            num_params_exact=True,
            hidden_size=1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            intermediate_size=1,
            vocab_size=1,
            tie_word_embeddings=True,
            config={"pad_token_id": 0},
        ),
        data=None,
        provenance=Provenance(created_at="2026-01-31T09:15:00Z", launcher_version="0", python="3.11", packages={}),
    )
