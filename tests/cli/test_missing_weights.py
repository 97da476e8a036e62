"""A model folder without all weights: the command refuses it and starts nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from weight_tools import change_weights, save_model, without


def test_a_model_folder_without_all_weights_is_refused_before_the_run_exists(
    launch_here: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "llama"})
    change_weights(folder, without("model.layers.1.mlp.up_proj.weight", "lm_head.weight"))
    # Read after the weights, so its content does not matter.
    (folder / "tokenizer.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": f" {i + 1}"}) + "\n" for i in range(8)))
    settings = [f"model.path={folder}", "model.name=mine", "data=jsonl", f"data.path={rows}", "tracking=none"]
    settings += [f"run.root={tmp_path / 'runs'}", "train.max_steps=2"]
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
    for verb in ("train", "plan"):
        again = launch_here(verb, *settings, LAUNCHER_CACHE=str(cache))
        assert (again.returncode, again.stderr) == (2, refusal)
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in cache.iterdir()) == ["isolation-checks", "weight-checks"], "no data was built"
