"""An interrupted evaluation's export is reused, unless another checkpoint has replaced its checkpoint."""

from __future__ import annotations

from pathlib import Path

import hand_made
import pytest

from launcher.evaluate.evaluation_folder import EvaluatedExport, EvaluationFolder
from launcher.evaluate.weights import export_tuned_weights
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records
from launcher.tracking.verdicts import digest_checkpoint


def test_an_interrupted_evaluation_exports_nothing_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    plan = hand_made.plan(tmp_path, hand_made.SETTINGS)
    folder = EvaluationFolder.of(tmp_path, 3)
    folder.weights.mkdir(parents=True)
    (folder.weights / "config.json").write_text('{"eos_token_id": 2}')
    checkpoint = hand_made.checkpoint(run, 3, 1.0, attempt=1)
    made = EvaluatedExport(digest_checkpoint(run, 3), plan.config.model.dtype, "known")
    json_records.write(folder.weights_record, made)
    weights = export_tuned_weights(plan, run, folder, 3)
    assert (weights.folder, weights.digest) == (str(folder.weights), "known")
    assert weights.stop_ids == (2,)
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"d"', '"e"'))
    # The launcher tries to export again, which fails because this run has no plan.json.
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        export_tuned_weights(plan, run, folder, 3)
    assert not folder.weights_record.exists()
