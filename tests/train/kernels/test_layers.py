"""Compiled decoder layers, which ZeRO-3 gathers as a whole: real ranks get the same training results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import RankServer

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.kernels import layers, liger
from launcher.train.model import build_model

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None

SMALL = (
    "model.dtype=fp32",
    "model.activation_checkpointing=every 2",
    "model.config.num_hidden_layers=3",
    "model.config.vocab_size=512",
    "+deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0",
    "train.global_batch_size=2",
    "data.max_length=48",
)
EXPERTS = (
    "model.config.model_type=qwen3_moe",
    "model.config.architectures=[Qwen3MoeForCausalLM]",
    "+model.config.num_experts=4",
    "+model.config.num_experts_per_tok=2",
    "+model.config.moe_intermediate_size=16",
    "model.config.num_hidden_layers=1",
    "model.activation_checkpointing=all",
)
COMPILED = "model.compile=true"


@pytest.mark.compiler
@pytest.mark.rest
def test_compiled_layers_train_as_single_modules_do(
    rank_server: RankServer, plan_of: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    results: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for settings in ((), (COMPILED,), EXPERTS, (*EXPERTS, COMPILED)):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        plan = folder / "plan.json"
        plan.write_text(plan_of(*SMALL, *settings).to_json())
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
        # Inductor takes half a minute for a model, so one model has to do.
        arguments = [str(plan), "", "aot_eager" if EXPERTS[0] in settings else "inductor"]
        results[settings] = rank_server.values(
            "train_ranks:train_with_layers", [arguments] * 2, folder, environment=environment, deadline_s=600
        )
    for settings, ranks in results.items():
        model = EXPERTS if settings[: len(EXPERTS)] == EXPERTS else ()
        for rank, expected in zip(ranks, results[model], strict=True):
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5), settings
            assert rank["has_own_speed"]
            if COMPILED not in settings:
                assert not rank["graphs"]
                continue
            # Two graphs per variant, before and after attention, regardless of the number of layers.
            assert 2 <= rank["graphs"] <= 12
            # Attention is the only graph break.
            assert [reason for reason in rank["breaks"] if "attend_within_documents" not in reason] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("uses_liger", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_LIGER, reason="needs Liger"))])
def test_on_a_gpu_compiled_layers_compute_what_others_do(plan_of: Callable[..., LaunchPlan], uses_liger: bool) -> None:
    plan = plan_of(*SMALL)
    ids = torch.arange(48)[None].cuda()
    positions = torch.cat([torch.arange(20), torch.arange(28)])[None].cuda()
    losses, gradients = [], []
    try:
        for compiles in (False, True):
            torch.manual_seed(1)
            options: dict[str, Any] = {"uses_liger": uses_liger and compiles, "compiles": compiles}
            model = build_model(plan.config.model, plan.model, "cuda", chunk_tokens=16, **options).cuda()
            loss = model(ids, positions, ids.roll(-1, dims=1))
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: parameter.grad for name, parameter in model.parameters_by_name().items()})
    finally:
        liger.undo()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def without_layers(num_layers: int) -> Any:
    model: Any = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.config = SimpleNamespace(model_type="mine", get_text_config=lambda: SimpleNamespace(num_hidden_layers=num_layers))
    return model


def test_a_machine_without_a_compiler_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError) as raised:
        layers.compile_layers(without_layers(0), torch.device("cpu"))
    assert "model.compile=false" in raised.value.problems[0].remedy


def test_layers_that_cannot_be_told_from_other_modules_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        layers.compile_layers(without_layers(2), torch.device("cpu"))
    assert raised.value.problems[0].where == "model.compile"
