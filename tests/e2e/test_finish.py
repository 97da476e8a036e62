"""A finished run leaves checkpoints, metrics, an export of the trained model and W&B's files, and no secret in any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from e2e_tools import TINY, assembled, committed, json_lines, losses, metrics, processes_of, status
from fake_hub import FakeHub, running_hub
from fake_wandb import records
from forked import Launch, require_exit
from hand_made import end_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.tracking.metrics import panels
from launcher.train.model import DTYPES

pytestmark = pytest.mark.rest

STEPS = 12
CANARY = "canary-7f3a9c51d2"
# The metrics that a run without GPUs must log; tests/train/monitoring/test_rank_stats.py checks the others.
METRICS = {
    *(f"trainer/{name}" for name in ("step", "epoch", "tokens", "samples", "progress", "eta_s")),
    *(f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")),
    *(f"eval/{of_set}/{name}" for of_set in ("held_out", "sums") for name in ("loss", "ppl")),
    *(f"perf/{name}" for name in ("tokens_per_sec", "tokens_per_sec_per_gpu", "tflops_per_gpu", "padding_frac", "goodput")),
    *(f"time/{name}" for name in ("step_s", "data_s", "fwd_bwd_s", "optim_s", "eval_s", "ckpt_s")),
    *(f"time/{name}" for name in ("step_max_rank_s", "straggler_ratio", "kept_s")),
    *(f"lost/{name}_s" for name in ("queue", "start", "load", "save", "eval", "restart", "replay")),
    *(f"data/{name}" for name in ("label_frac", "truncated_frac", "source/stdlib_docs/frac")),
    *(f"ckpt/{name}" for name in ("last_step", "save_s", "stall_s", "bytes", "disk_free_gib")),
    *(f"cost/{name}" for name in ("gpu_hours", "usd", "usd_per_million_tokens")),
    *(f"run/{name}" for name in ("attempt", "restarts", "nodes", "lost_steps")),
    *("host/cpu_util_mean", "host/ram_used_max_frac", "memory/host_rss_gib"),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)


SUMS = "".join(json.dumps({"prompt": f"{i} + {j} =", "completion": f"{i + j}"}) + "\n" for i in range(9) for j in range(9))


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub(CANARY) as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(launch: Launch, module_runs: Path, hub: FakeHub) -> tuple[Path, str]:
    settings = [s for s in TINY if s not in ("tracking=none", "eval.sample=false")]
    template = module_runs / "chat.jinja"
    template.write_text(TEMPLATE)
    sums = module_runs / "sums.jsonl"
    sums.write_text(SUMS)
    done = launch(
        *settings,
        f"train.max_steps={STEPS}",
        "checkpoint.save_every=2",
        "checkpoint.keep_last=3",
        "export.push_to_hub=owner/name",
        "optim.lr=1e-3",
        "tracking.mode=offline",
        "tracking.tags=[quiet]",
        "cluster.price_per_gpu_hour=3",
        f"data.chat_template={template}",
        f"eval.sets=[{{name: sums, path: {sums}, every: 5, max_rows: 3}}]",
        f"run.root={module_runs}",
        "run.name=finished",
        CANARY_TOKEN=CANARY,
        HF_TOKEN=CANARY,
        HF_ENDPOINT=hub.address,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        AWS_SECRET_ACCESS_KEY=CANARY,
    )
    require_exit(done)
    template.unlink()
    sums.unlink()
    return module_runs / "finished", done.stdout


def test_a_completed_run_leaves_its_documented_files(finished: tuple[Path, str]) -> None:
    run, _ = finished
    assert (status(run)["state"], status(run)["step"]) == ("completed", STEPS)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert committed(run) == [f"step-{step:08d}" for step in (8, 10, 12)]
    assert end_of(run)["state"] == "completed"
    assert (run / "code/launcher/train/loop.py").is_file()
    assert (run.stat().st_mode & 0o777) == 0o700
    assert not processes_of(run)


def test_its_settings_are_printed_as_a_file_that_plans_the_same(
    finished: tuple[Path, str], launch_here: Launch, tmp_path: Path
) -> None:
    run, _ = finished
    # The files that the settings name; the run itself no longer needs them.
    (run.parent / "chat.jinja").write_text(TEMPLATE)
    (run.parent / "sums.jsonl").write_text(SUMS)
    printed = launch_here("config", str(run), cwd=tmp_path)
    require_exit(printed)
    (tmp_path / "again.yaml").write_text(printed.stdout)
    planned = launch_here("plan", "again.yaml", "--json", cwd=tmp_path)
    require_exit(planned)
    again, before = json.loads(planned.stdout), json.loads((run / "plan.json").read_text())
    assert "weight_decay" not in printed.stdout  # it has its default
    for part in ("config", "topology", "batch", "deepspeed", "memory", "limits", "run_dir"):
        assert again[part] == before[part]


def test_every_metric_is_in_the_file_in_wandb_and_in_the_workspace(finished: tuple[Path, str]) -> None:
    run, _ = finished
    logged = {name for line in metrics(run) for name in line} - {"time", "attempt"}
    assert logged >= METRICS
    sent = records(run)
    history = [record["history"]["item"] for record in sent if record["type"] == "history"]
    assert [row["_step"] for row in history] == list(range(STEPS + 1))
    assert {name for row in history for name in row if not name.startswith("_")} == logged
    assert [row["train/loss"] for row in history[1:]] == pytest.approx([loss for _, loss in sorted(losses(run).items())])
    (first,) = (record["run"] for record in sent if record["type"] == "run")
    assert (first["tags"], first["config"]["update"]["config"]["train"]["max_steps"]) == (["quiet"], STEPS)
    shown = {name for section in panels().values() for panel in section for name in panel.metrics if "*" not in name}
    only_on_gpus = ("gpu/", "memory/peak_", "memory/planned_gib", "memory/alloc_retries", "perf/mfu", "perf/planned_")
    assert {name for name in shown - logged if not name.startswith(only_on_gpus)} == set()


def test_loss_falls_and_held_out_loss_is_measured_before_and_after(finished: tuple[Path, str]) -> None:
    held_out = [line["eval/held_out/loss"] for line in metrics(finished[0]) if "eval/held_out/loss" in line]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]
    of_set = {line["trainer/step"]: line["eval/sums/loss"] for line in metrics(finished[0]) if "eval/sums/loss" in line}
    assert [*of_set] == [0, 5, 10, STEPS]
    assert of_set[STEPS] < of_set[0]
    assert f"loss on sums at step 5: {of_set[5]:.4f} (" in finished[1]


def test_the_output_shows_losses_answers_and_paths(finished: tuple[Path, str]) -> None:
    run, output = finished
    for expected in (
        "parameters",
        "held-out loss before",
        "step  12/12",
        "held-out loss after",
        "held-out question",
        "answer after",
    ):
        assert expected in output
    for text in ("checkpoint", "wandb sync", "exported to", "python -m launcher status"):
        assert text in output
    assert output.count("wandb sync") == 1
    assert "\x1b[" not in output, "plain lines where output is no terminal"
    assert status(run)["state"] == "completed"


def test_the_export_equals_the_checkpoint_and_loads_in_transformers(finished: tuple[Path, str]) -> None:
    run, _ = finished
    dtype = DTYPES[json.loads((run / "plan.json").read_text())["config"]["model"]["dtype"]]
    tensors = assembled(run / f"checkpoints/step-{STEPS:08d}")
    exported = load_file(run / "export/model.safetensors")
    names = {name.removesuffix("|fp32") for name in tensors if name.endswith("|fp32")}
    assert exported.keys() == names
    for name, tensor in exported.items():
        assert torch.equal(tensor.reshape(-1), tensors[f"{name}|fp32"].to(dtype)), name
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert model.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user:\nhi<|im_end|>\n<|im_start|>assistant:\n"
    )
    events = json_lines(run / "events.jsonl")
    fields = next(e for e in events if e["kind"] == "export")["fields"]
    assert fields["mean_kl"] < 1e-2
    assert fields["tensors_compared"] == len(exported)


def test_the_export_has_a_model_card_and_is_pushed_to_the_hub(finished: tuple[Path, str], hub: FakeHub) -> None:
    run, output = finished
    card = ModelCard.load(run / "export/README.md")
    assert card.data.license == "unknown"
    assert "| run | finished |" in card.text
    assert "| training, step 12 |" in card.text
    assert "| held_out, step 0 |" in card.text
    assert "| held_out, step 12 |" in card.text
    assert str(run.parent) not in card.content
    assert f"pushed to {hub.address}/owner/name" in output
    assert hub.files == {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert hub.private


def test_a_push_without_access_is_refused_before_anything_is_written(
    launch_here: Launch, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = finished
    for repo_id, expected in (("owner/name", "HF_TOKEN"), ("owner/name/more", "owner/name")):
        refused = launch_here("export", str(run), "--push", repo_id, "--out", str(tmp_path / "out"))
        assert refused.returncode == 2
        assert expected in refused.stderr
        assert "--push" in refused.stderr
        assert not (tmp_path / "out").exists()
    refused = launch_here(*TINY, "export.push_to_hub=owner/name", f"run.root={tmp_path}", "run.name=refused")
    assert refused.returncode == 2
    assert "HF_TOKEN" in refused.stderr
    assert not (tmp_path / "refused").exists()


def test_a_failed_push_keeps_the_folder_and_names_the_command_that_repeats_it(
    launch: Launch, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = finished
    # Use a separate process: the Hub's library reads these variables on import.
    nowhere = {"HF_TOKEN": CANARY, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    failed = launch("export", str(run), "--push", "owner/name", "--out", str(tmp_path / "out"), **nowhere)
    assert failed.returncode == 1
    assert "could not be pushed" in failed.stderr
    # model.dtype=auto depends on what the CPU computes fast.
    dtype = json.loads((run / "plan.json").read_text())["config"]["model"]["dtype"]
    chosen = f"--step 12 --dtype {dtype} --out {tmp_path / 'out'} --push owner/name"
    assert f"python -m launcher export {run} {chosen}" in failed.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
    assert CANARY not in failed.stdout + failed.stderr


def test_export_writes_a_checkpoint_in_another_dtype(launch_here: Launch, finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    out = tmp_path / "again"
    done = launch_here("export", str(run), "--step", "12", "--dtype", "fp32", "--out", str(out))
    require_exit(done)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    missing = launch_here("export", str(run), "--step", "2")
    assert missing.returncode == 2
    assert "step" in missing.stderr


def test_wandb_logs_the_run_offline_under_the_id_of_the_plan(finished: tuple[Path, str]) -> None:
    run, _ = finished
    wandb_id = json.loads((run / "plan.json").read_text())["wandb_id"]
    assert list((run / "wandb").glob(f"offline-run-*-{wandb_id}/run-{wandb_id}.wandb"))


def test_no_file_contains_a_secret_of_the_environment(finished: tuple[Path, str]) -> None:
    run, output = finished
    assert CANARY not in output
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_a_completed_run_resumes_only_with_more_steps(launch_here: Launch, finished: tuple[Path, str]) -> None:
    run, _ = finished
    refused = launch_here("resume", str(run))
    assert refused.returncode == 2
    assert "train.max_steps" in refused.stderr
    other = launch_here("resume", str(run), "run.seed=1")
    assert other.returncode == 2
    assert "run.seed" in other.stderr
