"""Plans for a fixed, fictitious machine, and golden files; each conftest whose tests make plans imports this."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.plan import LABEL_COLUMNS, plan_rows
from launcher.config.compose import compose_one, conf_dir
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.config.sections.slurm import SlurmSection
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DataFacts, DeviceFacts, Facts, LaunchPlan, Provenance
from launcher.plan.planner import plan

GOLDEN = Path(__file__).with_name("golden")
REGENERATE = "LAUNCHER_WRITE_GOLDEN"

CPU = DeviceFacts(kind="cpu", name="a CPU", count=2, host_memory_gib=24.0)
H100 = DeviceFacts(kind="cuda", name="NVIDIA H100 80GB HBM3", count=8, memory_gib=79.1, host_memory_gib=2000.0)
DATA = DataFacts(
    cache_dir="/cache/data/0123",
    num_rows=1000,
    num_docs=5000,
    num_tokens=900_000,
    num_trained_tokens=450_000,
    num_eval_rows=10,
    num_eval_tokens=9000,
    truncated_docs=3,
    truncated_tokens=500,
    padding_frac=0.02,
)
PROVENANCE = Provenance(
    created_at="2026-01-31T09:15:00Z",
    overrides=("model=tiny",),
    launcher_version="0.1.0",
    git_commit="0" * 40,
    git_dirty=False,
    python="3.11.9",
    packages={"torch": "2.13.0"},
)
WORKING_DIR = "/srv/project"
# Fixtures that make a run's settings, or its plan, from overrides.
ConfigOf = Callable[..., RunConfig]
PlanOf = Callable[..., LaunchPlan]
# One preset for each way in which transformers builds a layer.
KINDS = (
    "llama3_2_1b",
    "qwen3_0_6b",
    "qwen2_5_0_5b",
    "gemma3_1b",
    "olmo2_1b",
    "phi4",
    "smollm3_3b",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
)


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Return the model config of a preset, with changes."""
    return {**yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text())["config"], **changes}


@functools.cache
def composed(tokens: tuple[str, ...]) -> RunConfig:
    return compose_one(tokens).config


def facts_for(
    config: RunConfig, device: DeviceFacts = CPU, data: DataFacts | None = DATA, working_dir: str = WORKING_DIR, **numbers: Any
) -> Facts:
    """Facts of a fixed, fictitious machine; the model's numbers come from its settings."""
    assert config.model.config is not None
    model = model_facts({**config.model.config, **numbers}, config.model.path, None, None)
    return Facts(working_dir=working_dir, home_dir="/home/me", device=device, model=model, data=data, provenance=PROVENANCE)


@pytest.fixture
def config_of() -> ConfigOf:
    """The settings of a command line, with a model whose numbers are in its preset."""

    def config(*tokens: str) -> RunConfig:
        return composed(tokens if any(t.startswith(("model=", "experiment=")) for t in tokens) else ("model=tiny", *tokens))

    return config


@pytest.fixture
def plan_of(config_of: ConfigOf) -> PlanOf:
    def planned(
        *tokens: str, device: DeviceFacts = CPU, data: DataFacts | None = DATA, working_dir: Path | str = WORKING_DIR
    ) -> LaunchPlan:
        config = config_of(*tokens)
        return plan(config, facts_for(config, device, data, str(working_dir)))

    return planned


def _cluster_plan(section: type[SlurmSection | RaySection], *tokens: str) -> Any:
    """A fixture: the plan of a small run with these cluster settings; `workers` are all its ranks, `device` is one node's."""

    def fixture(config_of: ConfigOf) -> PlanOf:
        def planned(working_dir: str = WORKING_DIR, device: DeviceFacts = CPU, workers: int = 0, **settings: Any) -> LaunchPlan:
            if workers:
                ranks = settings.setdefault("ranks_per_node", workers)
                settings["nodes"] = workers // ranks
            config = config_of("run.name=tried", *tokens)
            kind = config.cluster.kind
            config = config.model_copy(update={"cluster": section.model_validate({"kind": kind, **settings})})
            return plan(config, facts_for(config, device, working_dir=working_dir))

        return planned

    return pytest.fixture(fixture)


slurm_plan = _cluster_plan(SlurmSection, "cluster=slurm", "train.global_batch_size=144")
ray_plan = _cluster_plan(RaySection, "cluster=ray", "train.global_batch_size=4", "train.micro_batch_size=1")


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME; with LAUNCHER_WRITE_GOLDEN=1 in the environment, write it."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if os.environ.get(REGENERATE) == "1":
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"write it with: {REGENERATE}=1 pytest"
        assert text == file.read_text(encoding="utf-8")

    return compare


def plan_lines(plan: LaunchPlan, **shown: Any) -> list[str]:
    """The rows of a plan as lines; `shown` is handed to `plan_rows`."""
    return [f"{label:<{LABEL_COLUMNS}}{value}" for label, value in plan_rows(plan, **shown).rows]
