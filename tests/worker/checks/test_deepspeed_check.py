"""DeepSpeed checks `deepspeed.extra` before anything starts."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import facts
from launcher.config.deepspeed_keys import SECTIONS
from launcher.config.schema import RunConfig
from launcher.worker.checks import deepspeed_check

ConfigOf = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("tokens", "key", "what", "remedy"),
    [
        (
            "zero_optimization: {overlap_com: true}",
            "zero_optimization.overlap_com",
            "has no such key",
            "did you mean overlap_comm?",
        ),
        (
            # The plan sets this option under its alias, which would take precedence.
            "zero_optimization: {max_reuse_distance: 5}",
            "zero_optimization.max_reuse_distance",
            "has no such key",
            "did you mean stage3_max_reuse_distance?",
        ),
        ("zero_optimization: {reduce_scatter: 3.5}", "zero_optimization.reduce_scatter", "valid boolean", "a valid value"),
        (
            "zero_optimization: {compute_grad_norm: false}",
            "zero_optimization",
            "only with ZeRO Stage 1 or 2",
            "a valid value",
        ),
        (
            "zero_optimization: {leaf_module: {clases: [a.B]}}",
            "zero_optimization.leaf_module.clases",
            "has no such key",
            "did you mean classes?",
        ),
        ("tensorboard: {output_pth: x}", "tensorboard.output_pth", "has no such key", "did you mean output_path?"),
        ("flops_profiler: {enabled: 'yes'}", "flops_profiler.enabled", "is not true or false", "default is false"),
        ("flops_profiler: {module_dept: 2}", "flops_profiler.module_dept", "has no such key", "did you mean module_depth?"),
        ("aio: {queue_depth: deep}", "aio.queue_depth", "is not a whole number", "default is 8"),
        ("wall_clock_breakdown: 'on'", "wall_clock_breakdown", "is not true or false", "default is false"),
        ("communication_data_type: bf61", "communication_data_type", "Invalid communication_data_type", "deepspeed.ai"),
        ("log_level: loud", "log_level", "loud is not one of the valid logging levels", "deepspeed.ai"),
        ("comet: {enabled: true}", "comet", "the Python package comet_ml is not installed", "pip install comet_ml"),
    ],
)
def test_a_key_that_deepspeed_refuses_or_ignores(config_of: ConfigOf, tokens: str, key: str, what: str, remedy: str) -> None:
    (problem,) = deepspeed_check.problems_of(config_of(f"deepspeed.extra={{{tokens}}}"))
    assert problem.message.startswith(f"deepspeed.extra.{key}: ")
    assert what in problem.message
    assert problem.where == "deepspeed.extra"
    assert remedy in problem.remedy


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_misspelled_key_is_refused_in_every_section(config_of: ConfigOf, section: str) -> None:
    tokens = ("deepspeed=zero3_offload", "model.dtype=bf16" if section == "bf16" else "model.dtype=fp16")
    (problem,) = deepspeed_check.problems_of(config_of(*tokens, f"deepspeed.extra.{section}.enbled=true"))
    assert problem.message == f"deepspeed.extra.{section}.enbled: DeepSpeed has no such key"


def test_all_problems_come_in_one_pass(config_of: ConfigOf) -> None:
    extra = "{zero_optimization: {overlap_com: true, reduce_scatter: 3.5}, aio: {block: 1}, log_level: loud}"
    assert len(deepspeed_check.problems_of(config_of(f"deepspeed.extra={extra}"))) == 4


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
    bad = config_of("deepspeed.extra={zero_optimization: {round_robin: true}}")
    assert answer(bad) != {"problems": []}
    assert not facts.is_extra_accepted(bad)
    # Another version may have other keys.
    monkeypatch.setattr(facts, "_version", lambda name: "99.0")
    assert not facts.is_extra_accepted(good)


@pytest.mark.rest
def test_a_run_with_a_misspelled_key_is_refused_and_leaves_nothing(
    launch_here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    extra = "deepspeed.extra={zero_optimization: {overlap_com: true}}"
    done = launch_here("model=tiny", "tracking=none", f"run.root={tmp_path}/runs", extra)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "deepspeed.extra.zero_optimization.overlap_com: DeepSpeed has no such key\n"
        "  where:  deepspeed.extra (command line)\n"
        "  value:  true\n"
        "  remedy: did you mean overlap_comm?\n"
    )
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()
