"""An evaluation refuses other users' files, which relative paths may name: the working directory may be another user's."""

from __future__ import annotations

from pathlib import Path

import hand_made
import pytest
from file_owners import MALLORY, as_root, give

from launcher import run_store
from launcher.errors import ConfigError, DamagedRun, DataError, SubmitError
from launcher.evaluate.engines.vllm_engine import read_version
from launcher.evaluate.generation import Share
from launcher.evaluate.task import EvaluationFolder
from launcher.models import plan_caches
from launcher.plan.launch_plan import DataFacts
from launcher.worker.evaluation import answer, prepare
from launcher.worker.scoring import passes, step, triage

__all__ = ["as_root"]

pytestmark = pytest.mark.usefixtures("as_root")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_an_interpreter_of_another_user_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = folder / "vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\ntouch {folder}/ran; echo 0.11\n")
    python.chmod(0o755)
    read_version(Path("vllm/bin/python"))
    (folder / "ran").unlink()
    give(folder)
    with pytest.raises(ConfigError, match=f"the Python interpreter of vLLM is not trusted: .* belongs to {MALLORY}"):
        read_version(Path("vllm/bin/python"))
    assert not (folder / "ran").exists()
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", str(MALLORY))
    read_version(Path("vllm/bin/python"))


def test_a_node_answers_for_no_run_of_another_user(folder: Path) -> None:
    """A run's path on one machine may be another user's folder on another machine."""
    run = run_store.create(hand_made.plan(folder / "run", hand_made.SETTINGS))
    evaluation = EvaluationFolder.of(run.root, 1)
    evaluation.root.mkdir(parents=True)
    share = Share(0, 1)
    with pytest.raises(DamagedRun, match=r"task\.json"):
        answer.answer(evaluation, share, 0)
    give(run.root)
    with pytest.raises(SubmitError, match=f"the run run is not trusted: .* belongs to {MALLORY}"):
        answer.answer(evaluation, share, 0)


@pytest.mark.parametrize("part", ["data/key", "models/key"])
def test_a_cache_that_another_user_has_replaced_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """`evaluate`, `data --scored` and `why` take the path from a run's plan, written when the cache was still the user's."""
    monkeypatch.setenv("LAUNCHER_CACHE", str(folder / "cache"))
    for name in ("data/key", "models/key"):
        (folder / "cache" / name).mkdir(parents=True)
    plan = hand_made.plan(folder / "run", hand_made.SETTINGS)
    counts = {name: 0 for name, field in DataFacts.model_fields.items() if field.annotation is int}
    data = DataFacts(cache_dir=str(folder / "cache/data/key"), padding_frac=0, digest="", **counts)
    model = plan.model.model_copy(update={"path": str(folder / "cache/models/key")})
    plan = plan.model_copy(update={"data": data, "model": model})
    run = run_store.create(plan)
    plan_caches.require_caches(plan)
    give(folder / "cache" / part)
    commands = (
        lambda: prepare.prepare(plan.config, run, 40),
        lambda: triage.rank_documents(run.plan, None, triage.TRAIN, 1, lambda stage, done, total: None),
        lambda: step.describe_step(run, plan, 1, False, 1, lambda stage, done, total: None),
    )
    for command in commands:
        with pytest.raises(DataError, match=f"this part of the cache is not trusted: .*{part} belongs to {MALLORY}"):
            command()


def test_a_score_pass_shares_no_folder_that_others_can_replace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(folder))
    (folder / "scores").mkdir()
    give(folder / "scores")
    with pytest.raises(DataError, match=f"scores belongs to {MALLORY}"), passes.temporary_folder():
        pass
    assert list((folder / "scores").iterdir()) == []


def test_the_ranks_of_a_score_pass_listen_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for variables in (*passes._rank_environments(1), *passes._rank_environments(2)):
        assert (variables["MASTER_ADDR"], variables["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
        assert variables["NCCL_SOCKET_IFNAME"] == "=lo"
