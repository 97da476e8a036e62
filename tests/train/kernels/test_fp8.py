"""Linear layers in FP8: real ranks train almost as in bf16. On CPUs, torchao emulates the matrix products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import RankServer
from torch import Tensor, nn
from torchao_folder import find_torchao

from launcher.config.schema import ModelSection
from launcher.errors import ConfigError
from launcher.plan.architecture.facts import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.kernels import fp8
from launcher.train.model import CausalLMLoss, build_model

CPU = torch.device("cpu")
CONFIG = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
}
IDS = torch.arange(24)[None]
POSITIONS = torch.cat([torch.arange(10), torch.arange(14)])[None]
PROJECTIONS = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SETTINGS = (
    *("model.dtype=bf16", "model.activation_checkpointing=every 2", "model.config.num_hidden_layers=3"),
    *("model.config.hidden_size=64", "model.config.intermediate_size=96", "model.config.num_attention_heads=4"),
    *("model.config.num_key_value_heads=2", "model.config.head_dim=16", "model.config.vocab_size=512"),
    *("deepspeed.param_persistence_threshold=0", "train.global_batch_size=2", "data.max_length=48", "optim.lr=1e-3"),
)


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> str:
    if not hasattr(torch.nn.functional, "ScalingType"):
        pytest.skip("torchao needs a newer torch")
    folder = str(find_torchao())
    monkeypatch.syspath_prepend(folder)
    return folder


def build(device: str = "cpu", uses_fp8: bool = True, compiles: bool = False, **changes: Any) -> CausalLMLoss:
    config = {**CONFIG, **changes}
    section = ModelSection(init="random", config=config, tokenizer="./tokenizer", dtype="bf16")
    facts = model_facts(config, None, None, None)
    torch.manual_seed(1)
    return build_model(section, facts, device, chunk_tokens=16, uses_fp8=uses_fp8, compiles=compiles)


def converted(model: CausalLMLoss) -> set[str]:
    """Return the names of the layers that compute in FP8, relative to their decoder layer."""
    names = [name for name, module in model.hf.named_modules() if isinstance(module, fp8.Fp8Linear)]
    assert all(name.startswith("model.layers.") for name in names)
    return {name.split(".", 3)[3] for name in names}


def linear(rows: int = 48, columns: int = 32, bias: bool = False) -> fp8.Fp8Linear:
    torch.manual_seed(2)
    layer: Any = nn.Linear(columns, rows, bias=bias, dtype=torch.bfloat16)
    layer.__class__ = fp8.Fp8Linear
    return layer


def relative_error(computed: Tensor, expected: Tensor) -> float:
    return float((computed.detach() - expected.detach()).float().norm() / expected.detach().float().norm())


@pytest.mark.rest
def test_real_ranks_train_in_fp8_almost_as_in_bf16(
    rank_server: RankServer, plan_of: Callable[..., LaunchPlan], tmp_path: Path, torchao: str
) -> None:
    """Parameters are partitioned, some layers recompute, and layers are gathered by module, as a whole, or compiled."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name, settings in {
        "bf16": (),
        "fp8": (),
        "whole": ("deepspeed.whole_layers=true",),
        "compiled": ("model.compile=true",),
    }.items():
        plan = plan_of(*SETTINGS, *settings)
        section = plan.config.model.model_copy(update={"fp8": name != "bf16"})
        plan = plan.model_copy(update={"config": plan.config.model_copy(update={"model": section})})
        folder = tmp_path / name
        folder.mkdir()
        (folder / "plan.json").write_text(plan.to_json())
        results[name] = rank_server.values(
            "train_ranks:train_with_layers",
            [[str(folder / "plan.json"), torchao]] * 2,
            folder,
            environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
            deadline_s=600,
        )
    for name, ranks in results.items():
        for rank, in_bf16, in_fp8 in zip(ranks, results["bf16"], results["fp8"], strict=True):
            # Four training losses, an evaluation loss, and the last gradient norm.
            assert rank["losses"] == pytest.approx(in_bf16["losses"], rel=0.02), name
            # Optimizer, checkpoint and export see the same weights as in bf16.
            assert rank["weights"] == in_bf16["weights"]
            assert {dtype for dtype, _ in rank["weights"].values()} == {"torch.bfloat16"}
            if name == "bf16":
                assert rank["fp8_use"] == ""
                continue
            assert rank["fp8_use"] == "21 of 21 linear layers of decoder layers are computed in FP8 while training"
            # The first loss already shows the FP8 rounding.
            assert rank["losses"][0] != in_bf16["losses"][0]
            assert rank["losses"] == pytest.approx(in_fp8["losses"], rel=0.005), name
            if name == "compiled":
                # A linear layer causes no graph break.
                assert [reason for reason in rank["breaks"] if "attend_within_documents" not in reason] == []


def test_an_evaluation_computes_in_bf16_what_the_export_will() -> None:
    in_fp8, in_bf16 = build(), build(uses_fp8=False)
    labels = IDS.roll(-1, dims=1)
    trained, expected = in_fp8(IDS, POSITIONS, labels), in_bf16(IDS, POSITIONS, labels)
    assert trained.item() == pytest.approx(expected.item(), rel=0.02)
    assert trained.item() != expected.item()
    trained.backward()
    expected.backward()
    gradients = {name: one.grad for name, one in in_bf16.parameters_by_name().items()}
    for name, one in in_fp8.parameters_by_name().items():
        assert one.grad is not None
        assert relative_error(one.grad, gradients[name]) < 0.25, name
    torch.testing.assert_close(in_fp8.eval()(IDS, POSITIONS), in_bf16.eval()(IDS, POSITIONS), rtol=0, atol=0)


@pytest.mark.parametrize("emulates", [True, False])
@pytest.mark.parametrize("tokens", [32, 21], ids=["a multiple of 16", "padded"])
def test_a_layer_and_its_gradients_are_those_of_bf16_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch, tokens: int, emulates: bool
) -> None:
    """Also tests the GPU's products: torch implements them on CPUs too, with the same size and layout requirements."""
    settings = fp8._settings
    monkeypatch.setattr(fp8, "_settings", lambda _, pads: settings("cpu" if emulates else "cuda", pads))
    layer = linear(bias=True)
    inputs = torch.randn(1, tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(1, tokens, 48, dtype=torch.bfloat16)
    computed = layer(inputs)
    of_computed = torch.autograd.grad(computed, (inputs, layer.weight, layer.bias), gradient)
    expected = nn.functional.linear(inputs, layer.weight, layer.bias)
    of_expected = torch.autograd.grad(expected, (inputs, layer.weight, layer.bias), gradient)
    for one, other in zip((computed, *of_computed), (expected, *of_expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
    for one, other in zip((computed, *of_computed[:2]), (expected, *of_expected[:2]), strict=True):
        assert 0.005 < relative_error(one, other) < 0.1


def test_a_token_does_not_change_how_others_are_rounded() -> None:
    """Otherwise packed documents would affect each other: with one scale per tensor, a large value changes all rounding."""
    layer, inputs = linear(), torch.randn(20, 32, dtype=torch.bfloat16)
    before = layer(inputs)
    inputs[7] *= 1000
    after = layer(inputs)
    others = torch.arange(20) != 7
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert not torch.equal(after[7], before[7])


def test_the_backward_pass_reads_the_weight_that_is_gathered_then() -> None:
    """ZeRO-3 releases a weight by replacing the parameter's data; saved references would keep all layers in memory."""
    layer, other = linear(), linear()
    inputs = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    gathered, gradient = layer.weight.data, torch.randn(16, 48, dtype=torch.bfloat16)
    output = layer(inputs)
    layer.weight.data = torch.empty(0, dtype=torch.bfloat16)
    layer.weight.data = 2 * gathered
    (of_inputs,) = torch.autograd.grad(output, (inputs,), gradient)
    other.weight.data = 2 * gathered
    (expected,) = torch.autograd.grad(other(inputs), (inputs,), gradient)
    torch.testing.assert_close(of_inputs, expected, rtol=0, atol=0)


@pytest.mark.rest
def test_a_compiled_layer_waits_for_its_backward_pass_with_parameters_and_no_copies_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler chooses what to save, and saved FP8 weights would take half the memory that ZeRO-3 releases."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings = fp8._settings
    monkeypatch.setattr(fp8, "_settings", lambda _, pads: settings("cuda", pads))
    torch._dynamo.reset()
    torch._dynamo.allow_in_graph(fp8._Product)
    first, second = linear(160, 64), linear(64, 160)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    compiled = torch.compile(lambda inputs: second(nn.functional.silu(first(inputs))))
    inputs = torch.randn(1, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compiled(inputs)
    output.sum().backward()
    assert inputs.grad is not None
    weights = [tensor for tensor in kept if tensor.numel() == 160 * 64]
    assert {id(weight) for weight in weights} == {id(first.weight), id(second.weight)}
    assert any(tensor.dtype == torch.bfloat16 and tensor.numel() == 32 * 160 for tensor in kept)


def test_linear_layers_whose_sizes_fp8_does_not_take_are_left_out_and_named() -> None:
    model = build(intermediate_size=100)
    assert converted(model) == {name for name in PROJECTIONS if name.startswith("self_attn")}
    assert model.fp8_use == (
        "8 of 14 linear layers of decoder layers are computed in FP8 while training; 6 are not, with sizes that are not "
        "multiples of 16: mlp.gate_proj (100 x 64), mlp.up_proj (100 x 64), mlp.down_proj (64 x 100)"
    )
    with pytest.raises(ConfigError, match="no linear layers that can be computed in FP8") as raised:
        build(hidden_size=72, intermediate_size=100)
    assert raised.value.problems[0].remedy == "set model.fp8=false"


def test_neither_the_head_nor_routers_nor_experts_compute_in_fp8() -> None:
    assert converted(build()) == PROJECTIONS
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    with_experts = build(model_type="qwen2_moe", shared_expert_intermediate_size=96, **experts)
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert converted(with_experts) == {name for name in PROJECTIONS if name.startswith("self_attn")} | shared
    with_experts(IDS, POSITIONS, IDS).backward()


def test_a_rank_that_cannot_compute_in_fp8_ends_the_run_on_all_ranks(
    rank_server: RankServer, tmp_path: Path, torchao: str
) -> None:
    for rank in rank_server.values("fp8_ranks:build_in_fp8", [[torchao], [None]], tmp_path):
        assert (rank["message"], rank["where"]) == ("linear layers cannot be computed in FP8", "model.fp8")
        assert rank["value"].startswith("rank 1: ModuleNotFoundError: ")
        assert "torchao" in rank["value"]
        assert rank["remedy"].startswith("pip install 'launcher[fp8]' on every node")
        assert rank["remedy"].endswith("or set model.fp8=false")


def test_a_gpu_without_scales_by_row_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ConfigError, match="cannot be computed in FP8") as raised:
        fp8.require_usable(torch.device("cuda"))
    assert raised.value.problems[0].value.endswith("FP8 needs a GPU of compute capability 9.0, and this one has 8.9")
    fp8.require_usable(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiles", [False, True])
def test_on_a_gpu_fp8_computes_almost_what_bf16_does(compiles: bool) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    labels = IDS.roll(-1, dims=1)
    losses, gradients = [], []
    for uses_fp8 in (False, True):
        model = build("cuda", uses_fp8=uses_fp8, compiles=compiles).cuda()
        loss = model(IDS.cuda(), POSITIONS.cuda(), labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.parameters_by_name().items()})
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 0.25, name
