"""A backend is one section class, one cluster class, one conf file, and one entry in each of two tables; here: Kubernetes."""

from __future__ import annotations

import functools
import json
import operator
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from plan_fixtures import CPU, DATA, facts_for
from pydantic import Field

from launcher import facts, run_store
from launcher.cli.main import main
from launcher.clusters.backends import BACKENDS, Cluster, InjectedFault
from launcher.config.known_settings import settings
from launcher.config.schema import SECTIONS, RunConfig
from launcher.config.sections.cluster import ClusterSection
from launcher.config.sections.fields import Name
from launcher.data.checks import findings
from launcher.errors import SubmitError
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Status


class K8sSection(ClusterSection):
    """A Kubernetes backend: one Job per attempt."""

    kind: Literal["k8s"] = Field("k8s", description="The backend that starts the workers.")
    namespace: Name = Field("default", description="Namespace of the Job.")

    memory_remedy: ClassVar[str] = "raise the memory of the Job's pod template"


class K8sCluster:
    """Writes manifests instead of contacting a cluster; see `Cluster`."""

    status_interval_s = 1.0
    drill_remedy = "start a short run, and delete a pod with: kubectl delete pod"

    def device(self, section: ClusterSection) -> DeviceFacts:
        return CPU

    def check(self, plan: LaunchPlan) -> None:
        if K8sSection.of(plan.config.cluster).namespace == "closed":
            raise SubmitError("nobody may use this namespace", where="cluster.namespace", value="closed", remedy="choose another")

    def preview(self, plan: LaunchPlan) -> str | None:
        return json.dumps(manifest(plan, RunDir(Path(plan.run_dir)).plan, attempt=1), indent=2) + "\n"

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        plan = LaunchPlan.load(plan_path)
        manifest_file(run, attempt).write_text(json.dumps(manifest(plan, plan_path, attempt)))

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        return [("job", json.loads(manifest_file(run, attempt).read_text())["metadata"]["name"])]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        number = run_store.newest_attempt(run)
        if status.state in RUNNING_STATES and manifest_file(run, number).is_file():
            return replace(status, state="running", message="the Job has its pods")
        return status

    def await_end(self, run: RunDir) -> None:
        return None

    def cancel(self, run: RunDir, save: bool = True) -> None:
        run_store.update_status(run, state="cancelled", message="the Job was deleted")

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        raise NotImplementedError


def manifest(plan: LaunchPlan, plan_path: Path, attempt: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "launcher.worker.agent", str(plan_path), str(attempt)]
    section = K8sSection.of(plan.config.cluster)
    return {
        "kind": "Job",
        "metadata": {"name": f"{plan.run_name}-{attempt}", "namespace": section.namespace},
        "spec": {"completions": plan.topology.nodes, "command": command},
    }


def manifest_file(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / "job.json"


@pytest.fixture
def conf_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder with the backend's conf file; the backend is in both tables."""
    (tmp_path / "conf/cluster").mkdir(parents=True)
    (tmp_path / "conf/cluster/k8s.yaml").write_text("# Kubernetes.\nkind: k8s\nnodes: 1\nnamespace: training\n")
    monkeypatch.setitem(BACKENDS, "k8s", f"{__name__}:K8sCluster")
    monkeypatch.setitem(SECTIONS, "k8s", K8sSection)
    # The schema reads the table when it is imported, so build it again.
    field = RunConfig.model_fields["cluster"]
    with monkeypatch.context() as patched:
        patched.setattr(field, "annotation", functools.reduce(operator.or_, SECTIONS.values()))
        rebuild_schema()
        yield tmp_path / "conf"
    rebuild_schema()


def rebuild_schema() -> None:
    for model in (RunConfig, LaunchPlan):
        model.model_rebuild(force=True)
    settings.cache_clear()


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fake a prepared model and data in the test's own folder; preparing them would take a process several seconds."""

    findings.write(tmp_path, ())
    data = DATA.model_copy(update={"cache_dir": str(tmp_path)})

    def gather(config: RunConfig, found: object, overrides: object, here: DeviceFacts | None) -> Facts:
        return facts_for(config, here or CPU, data, working_dir=str(tmp_path))

    monkeypatch.setattr(facts, "gather", gather)
    monkeypatch.setattr(facts, "prepared_data", lambda config, found: (data, {}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.rest
def test_a_backend_is_two_classes_one_conf_file_and_two_entries(conf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend: Cluster = K8sCluster()
    assert backend.drill_remedy is not None
    chosen = ["--config-dir", str(conf_dir), "model=tiny", "cluster=k8s", "tracking=none", "run.name=tried"]

    assert main(["plan", "--script", *chosen]) == 0
    assert '"namespace": "training"' in capsys.readouterr().out
    assert not Path("runs").exists()

    assert main(["train", *chosen, "cluster.namespace=mine"]) == 0
    assert "job" in (shown := capsys.readouterr().out), shown
    assert "tried-1" in shown
    run = RunDir(Path("runs/tried").absolute())
    job = json.loads(manifest_file(run, 1).read_text())
    assert job["metadata"] == {"name": "tried-1", "namespace": "mine"}
    assert job["spec"]["command"][1:] == ["-m", "launcher.worker.agent", str(run.plan), "1"]

    assert main(["status", "tried", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
    assert main(["train", *chosen]) == 2
    assert "the run is running already" in capsys.readouterr().err
    assert main(["cancel", "tried"]) == 0
    assert run_store.read_status(run).state == "cancelled"


@pytest.mark.rest
def test_a_backends_own_checks_and_settings_are_enforced(conf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--config-dir", str(conf_dir), "model=tiny", "cluster=k8s", "tracking=none", "run.name=tried"]
    assert main(["train", *chosen, "cluster.namespace=closed"]) == 2
    assert "nobody may use this namespace" in capsys.readouterr().err
    assert main(["train", *chosen, "cluster.namspace=mine"]) == 2
    assert "did you mean cluster.namespace?" in capsys.readouterr().err
    assert main(["drill", "--fault", "kill-rank", *chosen]) == 2
    assert "kubectl delete pod" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_an_unknown_kind_of_cluster_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=tiny", "cluster.kind=k8s"]) == 2
    assert "choose one of: local, slurm, ray" in capsys.readouterr().err
