"""Commands refuse a model with missing weights, or one that the Hub denies access to, and start nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from http_server import Answer, Request, serving
from weight_tools import change_weights, save_model, without


@pytest.mark.rest
def test_a_model_folder_without_all_weights_is_refused_before_the_run_exists(
    launch_here: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
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
def test_a_gated_preset_names_license_and_token(launch_here: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    folders = {"LAUNCHER_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    with serving(answer_without_token) as address:
        done = launch_here("data", "model=llama3_2_1b", HF_ENDPOINT=address, **folders)
    assert (done.returncode, done.stdout) == (2, "")
    repository = "meta-llama/Llama-3.2-1B-Instruct"
    assert done.stderr.endswith(
        f"{repository} is gated: the Hub gives it only to accounts that accepted its license\n"
        "  where:  model.path\n"
        f"  value:  {repository}\n"
        f"  remedy: accept it at https://huggingface.co/{repository}, and set HF_TOKEN to a token of that account\n"
    )
