"""What `train` checks before it starts: the price, the disk, the model's weights, and names and speeds of earlier runs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import hand_made
import pytest
from forked import Launch, require_exit
from http_server import Answer, Request, serving
from plan_fixtures import H100, PlanOf
from unusual_files import as_root
from weight_tools import change_weights, save_model, without

from launcher.checkpoint import store
from launcher.cli.start_run import require_consent
from launcher.errors import ConfigError
from launcher.plan.gpu_types import Price
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.throughput import SpeedEstimate
from launcher.runs import run_store
from launcher.runs.run_records import Attempt

__all__ = ["as_root"]
UNKNOWN = SpeedEstimate("no estimate")
MODEL = ("model=qwen3_0_6b", "data=jsonl", "data.path=rows.jsonl", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=2")


def estimate(usd: float) -> SpeedEstimate:
    return replace(UNKNOWN, usd=(usd / 2, usd))


def plan(price: float | None = 2.0, **run: float) -> LaunchPlan:
    """The plan of a run of two ranks."""
    costs = None if price is None else Price(price)
    cluster = {} if price is None else {"cluster": {"kind": "local", "price_per_gpu_hour": price}}
    return hand_made.plan(Path("/srv/runs/demo"), {**hand_made.SETTINGS, **cluster, "run": run}, price=costs)


@pytest.mark.rest
@pytest.mark.parametrize(
    ("planned", "message"),
    [
        ([(plan(confirm_usd=50), estimate(50))], None),
        ([(plan(confirm_usd=50), estimate(60))], r"the run may cost up to \$60\.00"),
        ([(plan(confirm_usd=50, max_usd=40), estimate(60))], None),
        ([(plan(confirm_usd=50), UNKNOWN)], "the cost of the run is not known"),
        ([(plan(None, confirm_usd=50), UNKNOWN)], None),
        ([(plan(confirm_usd=50), estimate(30)), (plan(confirm_usd=90), estimate(30))], r"2 runs may cost up to \$60\.00"),
        (
            [(plan(confirm_usd=50), estimate(30)), (plan(confirm_usd=50), UNKNOWN)],
            r"2 runs may cost more than \$30\.00: the cost of 1 is not known",
        ),
    ],
)
def test_without_a_terminal_costly_runs_are_refused(planned: list[tuple[LaunchPlan, SpeedEstimate]], message: str | None) -> None:
    if message is None:
        assert require_consent(planned)
        return
    with pytest.raises(ConfigError, match=f"{message}, and there is no terminal to ask on") as error:
        require_consent(planned)
    assert "add --yes" in error.value.problems[0].remedy


@pytest.mark.rest
@pytest.mark.parametrize(("typed", "may_start"), [(b"y\n", True), (b"\n", False), (b"no\n", False), (b"\x04", False)])
def test_the_answer_on_a_terminal_decides(typed: bytes, may_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with open(terminal, closefd=False) as stdin, open(terminal, "w") as stdout:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr("sys.stdout", stdout)
        os.write(controller, typed)
        assert require_consent([(plan(confirm_usd=50), estimate(60))]) == may_start
        shown = b""
        while b"Start? [y/N]" not in shown:
            shown += os.read(controller, 4096)
    assert b"the run may cost up to $60.00 (run.confirm_usd=50). Start? [y/N]" in shown
    os.close(controller)


@pytest.mark.rest
def test_a_declined_cost_is_refused_on_every_machine(launcher_env: Mapping[str, str], tmp_path: Path) -> None:
    settings = ("model=tiny", "run.confirm_usd=1", "run.name=costly", f"run.root={tmp_path}", "cluster.price_per_gpu_hour=2")
    command = [sys.executable, "-m", "launcher", "train", "+cluster=static", *settings, "train.max_steps=1", "tracking.kind=none"]
    controller, terminal = pty.openpty()
    os.write(controller, b"no\n")
    try:
        done = subprocess.run(
            command, env=launcher_env, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=300
        )
    finally:
        os.close(controller)
        os.close(terminal)
    require_exit(done, 2)
    assert "the cost of the run was not accepted" in done.stderr
    assert not any(tmp_path.iterdir())


SETTINGS = (
    "model=tiny",
    "model.dtype=fp32",
    "tracking=none",
    "train.max_steps=20",
    "checkpoint.save_every=5",
    "checkpoint.keep_last=2",
    "run.name=room",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty disk of a given size, such as `disk("8m")`."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True, timeout=10)
        return folder

    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True, timeout=10)


def test_a_disk_without_room_for_one_checkpoint_is_refused(launch_here: Launch, disk: Callable[[str], Path]) -> None:
    root = disk("8m") / "not" / "there"
    done = launch_here("train", *SETTINGS, f"run.root={root}")
    assert done.returncode == 2
    assert "no room for a single checkpoint" in done.stderr
    assert "MiB, available 8.00 MiB" in done.stderr
    assert "remedy: " in done.stderr
    assert not root.parent.exists()


def test_a_run_root_that_cannot_be_made_is_refused_before_anything_that_takes_time(
    launch_here: Launch, tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    (tmp_path / "file").touch()
    closed = disk("8m")
    subprocess.run(["mount", "-o", "remount,ro", closed], check=True, timeout=10)
    for above, reason in ((tmp_path / "file", "is not a folder"), (closed, "cannot be written")):
        message = f"the run directory cannot be created: {above} {reason}"
        done = launch_here("train", *SETTINGS, f"run.root={above}/runs")
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        done = launch_here("plan", *SETTINGS, f"run.root={above}/runs")
        require_exit(done)
        assert f"train will be refused: {message}; choose another run.root" in " ".join(done.stdout.split())


def test_a_disk_too_small_for_all_kept_checkpoints_is_noted(launch_here: Launch, disk: Callable[[str], Path]) -> None:
    root = disk("40m")
    done = launch_here("plan", *SETTINGS, f"run.root={root}")
    require_exit(done)
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note")]
    assert "has 40.00 MiB free and needs 46.85 MiB for 3 checkpoints" in note
    assert "note" not in launch_here("plan", *SETTINGS, "checkpoint.keep_last=1", f"run.root={root}").stdout


@pytest.mark.rest
def test_resume_refuses_a_disk_without_room_for_a_save(launch_here: Launch, disk: Callable[[str], Path], tmp_path: Path) -> None:
    """The checkpoints folder is on another disk, which is nearly full."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n' * 3)
    settings = (*SETTINGS, "data=jsonl", f"data.path={tmp_path}/rows.jsonl", "data.eval_fraction=0")
    assert launch_here("data", *settings).returncode == 0  # `train` prepares the data before it plans
    printed = json.loads(launch_here("plan", "--json", *settings, f"run.root={tmp_path}").stdout)
    plan = LaunchPlan.model_validate({key: value for key, value in printed.items() if key in LaunchPlan.model_fields})
    run = hand_made.run(plan, state="failed")
    run.checkpoints.symlink_to(disk("9m"))
    hand_made.checkpoint(run, 5, files={store.shard_name(0): b"x" * 2**20}, digest=plan.digest())
    done = launch_here("resume", str(run.root))
    assert done.returncode == 2
    assert "no room for a single checkpoint" in done.stderr
    assert run_store.newest_attempt(run) == 0


@pytest.mark.rest
def test_a_model_folder_without_all_weights_is_refused_before_the_run_exists(launch_here: Launch, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "llama"})
    change_weights(folder, without("model.layers.1.mlp.up_proj.weight", "lm_head.weight"))
    # Only read after the weights are checked, so its content does not matter.
    (folder / "tokenizer.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": f" {i + 1}"}) + "\n" for i in range(8)))
    settings = [f"model.path={folder}", "model.name=mine", "data=jsonl", f"data.path={rows}", "tracking=none"]
    settings += [f"run.root={tmp_path / 'runs'}", "train.max_steps=2", "data.max_length=64"]
    cache = tmp_path / "cache"
    refusal = (
        "model.path: the weight files lack 2 tensors of the model: lm_head.weight, model.layers.1.mlp.up_proj.weight\n"
        "  where:  model.path (command line)\n"
        f"  value:  {folder}\n"
        "  remedy: download the model folder again; model.init=random trains the whole model from random weights\n"
    )
    isolation = "checking that packed documents do not affect each other in this model (once)\n"
    first = launch_here("train", *settings, LAUNCHER_CACHE=str(cache))
    assert (first.returncode, first.stdout) == (2, "")
    assert first.stderr == f"{isolation}comparing the weight files with the model (once)\n{refusal}"
    # The result is cached: nothing is compared again, and `plan` uses it.
    again = launch_here("plan", *settings, LAUNCHER_CACHE=str(cache))
    assert (again.returncode, again.stderr) == (2, refusal)
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in cache.iterdir()) == ["isolation-checks", "weight-checks"], "no data was built"


def answer_without_token(request: Request) -> Answer:
    """The Hub as seen without a token: it lists the files of a gated model but refuses to send them."""
    names = ("config.json", "model.safetensors")
    if not request.path.startswith("/api/models/"):
        return 401, b"", {"X-Error-Code": "GatedRepo"}
    if "/tree/" in request.path:
        return 200, [{"type": "file", "path": name, "size": 1, "oid": "1" * 40} for name in names]
    return 200, {"id": "meta-llama/Llama-3.2-1B-Instruct", "sha": "1" * 40, "siblings": [{"rfilename": n} for n in names]}


@pytest.mark.rest
def test_a_gated_preset_names_license_and_token(launch_here: Launch, tmp_path: Path) -> None:
    folders = {"LAUNCHER_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    with serving(answer_without_token) as address:
        done = launch_here("data", "model=llama3_2_1b", HF_ENDPOINT=address, **folders)
    assert (done.returncode, done.stdout) == (2, "")
    repository = "meta-llama/Llama-3.2-1B-Instruct"
    assert done.stderr.endswith(
        f"{repository} cannot be fetched from the hub: the Hub gives it only to accounts that have accepted its terms\n"
        "  where:  model.path\n"
        f"  value:  {repository}\n"
        f"  remedy: accept them at https://huggingface.co/{repository}, and set HF_TOKEN to a token of that account\n"
    )


@pytest.mark.rest
def test_plan_shows_the_estimate_and_that_the_name_is_taken(plan_of: PlanOf, launch_here: Launch, tmp_path: Path) -> None:
    plan = plan_of(*MODEL, f"run.root={tmp_path}/runs", "run.name=first", device=H100)
    run = hand_made.run(plan, Attempt(None), state="completed")
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n')
    settings = [*MODEL[:1], "data=jsonl", f"data.path={tmp_path}/rows.jsonl", *MODEL[3:], f"run.root={tmp_path}/runs"]
    settings += ["train.max_steps=1000", "cluster.price_per_gpu_hour=3", "model.attention=sdpa"]
    environment = {"LAUNCHER_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = launch_here("plan", "--json", *settings, "run.name=first", **environment)
    require_exit(done)
    values = json.loads(done.stdout)
    estimate = values["estimate"]
    assert estimate["mfu"] == pytest.approx([0.1904, 0.38])
    assert "; assumes one document of" in estimate["basis"]
    low, high = estimate["hours"]
    assert 0 < low < high
    assert estimate["usd"] == pytest.approx([6 * low, 6 * high])
    assert values["checkpoint_gib"] == pytest.approx(values["checkpoint_bytes"] / 2**30, abs=0.001)
    (warning,) = values["warnings"]
    assert f"python -m launcher status {run.root}" in warning
    text = launch_here("plan", *settings, "run.name=first", **environment).stdout
    assert f"warning    {warning}\n" in text
    assert "MFU 19% to 38%, published for FSDP" in text
    free = json.loads(launch_here("plan", "--json", *settings, "run.name=second", **environment).stdout)
    assert (free["warnings"], free["estimate"]["mfu"]) == ([], estimate["mfu"])
