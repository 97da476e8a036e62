"""The row format, the column and the objective of docs/extending.md, added to a copy of the package as printed, train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from doc_tools import REPO, blocks
from e2e_tools import TINY, losses
from forked import Launch, require_exit

pytestmark = pytest.mark.rest
ANSWERS = [" ".join(["yes", "no", "perhaps"][: 1 + i % 3] * (1 + i % 5)) for i in range(24)]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package and of conf/, to which the page's files and entries are added."""
    folder = tmp_path / "package"
    for name in ("launcher", "conf"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks(REPO / "docs/extending.md"):
        name, _, text = block.body.partition("\n")
        if name.startswith(("# launcher/", "# conf/")):
            with (folder / name.removeprefix("# ")).open("a") as file:
                file.write(f"\n{text}")
    section = folder / "launcher/config/sections/data.py"
    section.write_text(section.read_text().replace('"text"] = Field(', '"text", "weighted"] = Field('))
    return folder


def test_weights_of_documents_are_weights_of_their_loss(launch: Launch, package: Path, runs: Path, tmp_path: Path) -> None:
    def train(name: str, objective: str, form: str, rows: Iterable[dict[str, Any]], exit_code: int = 0) -> Any:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = (*TINY, "train.max_steps=3", "data.eval_fraction=0", "data.packing=false", "data.checks.no_trained_token=keep")
        chosen = (f"objective={objective}", f"data.sources=[{{path: {file}, format: {form}}}]", f"run.name={name}")
        done = launch(*settings, *chosen, f"run.root={runs}", "export.enabled=false", cwd=package, PYTHONPATH=str(package))
        require_exit(done, exit_code)
        return list(losses(runs / name).values()) if exit_code == 0 else done.stderr

    def weigh(weights: Iterable[float]) -> Iterable[dict[str, Any]]:
        for i, weight in enumerate(weights):
            yield {"prompt": f"Question {i}?", "completion": ANSWERS[i], "weight": weight}

    equal = train("equal", "weighted", "weighted", weigh([2] * 24))
    assert equal == train("plain", "sft", "weighted", weigh([1] * 24))
    some = train("some", "weighted", "weighted", weigh([3, 0] * 12))
    # Weight 0 trains nothing, as a message of weight 0.
    turns = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "completion": [{"role": "assistant", "content": answer, "weight": (i + 1) % 2}],
        }
        for i, answer in enumerate(ANSWERS)
    ]
    assert some == pytest.approx(train("masked", "sft", "prompt_completion", turns), rel=1e-5)
    assert some != pytest.approx(equal, rel=1e-3)
    without = ({key: value for key, value in row.items() if key != "weight"} for row in weigh([1] * 24))
    assert "objective.name" in train("without", "weighted", "auto", without, exit_code=2)
    assert not (runs / "without").exists()
