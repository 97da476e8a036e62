"""DeepSpeed checks the values of `deepspeed.extra` before anything starts."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import facts
from launcher.config.schema import RunConfig
from launcher.worker.checks import deepspeed_check

ConfigOf = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("extra", "start"),
    [
        ("zero_optimization: {reduce_scatter: 3.5}", "deepspeed.extra.reduce_scatter: "),
        ("tensorboard: {output_pth: x}", "deepspeed.extra.tensorboard.output_pth: "),
        ("communication_data_type: bf61", "DeepSpeed refuses these keys: "),
    ],
)
def test_a_value_that_deepspeed_refuses(config_of: ConfigOf, extra: str, start: str) -> None:
    (problem,) = deepspeed_check.check(config_of(f"deepspeed.extra={{{extra}}}"))
    assert problem.message.startswith(start)
    assert problem.where == "deepspeed.extra"


def test_keys_that_are_accepted_once_need_no_process_again(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(config: RunConfig) -> object:
        monkeypatch.setattr("sys.stdin", io.StringIO(config.model_dump_json()))
        assert deepspeed_check.main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert facts.is_extra_accepted(config_of())
    good = config_of("deepspeed.extra={zero_optimization: {round_robin_gradients: true}, wall_clock_breakdown: true}")
    assert not facts.is_extra_accepted(good)
    assert answer(good) == {"problems": []}
    assert facts.is_extra_accepted(good)
    bad = config_of("deepspeed.extra={zero_optimization: {reduce_scatter: 3.5}}")
    assert answer(bad) != {"problems": []}
    assert not facts.is_extra_accepted(bad)
    # Another version may have other keys.
    monkeypatch.setattr(facts, "_find_version", lambda name: "99.0")
    assert not facts.is_extra_accepted(good)


@pytest.mark.rest
def test_a_run_with_a_value_that_deepspeed_refuses_leaves_nothing(
    launch_here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    extra = "deepspeed.extra={zero_optimization: {reduce_scatter: 3.5}}"
    done = launch_here("model=tiny", "tracking=none", f"run.root={tmp_path}/runs", extra)
    assert done.returncode == 2, done.stderr
    assert "deepspeed.extra" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()
