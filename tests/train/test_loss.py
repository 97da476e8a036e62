"""The chunked loss compared with torch's cross entropy.

Liger is used only in the model that trains; on CPUs, a stand-in patches the same parts of transformers.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hand_made
import pytest
import torch
from forked_ranks import RankServer
from liger_package import APPLIED_IN_PART, write_package
from plan_fixtures import PlanOf
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.distributed import RankInfo
from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts
from launcher.tracking.tracker import Composite
from launcher.train import liger
from launcher.train.finish import write_weights
from launcher.train.loss import LossHead
from launcher.train.model import CausalLMLoss, build_model

CPU = torch.device("cpu")
CONFIG = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
IDS = torch.arange(24)[None]
POSITIONS = torch.cat([torch.arange(10), torch.arange(14)])[None]


def head_of(bias: bool, chunk_tokens: int, dtype: torch.dtype = torch.float64) -> LossHead:
    torch.manual_seed(0)
    head = LossHead(8, 31, bias=bias, dtype=dtype)
    head.chunk_tokens = chunk_tokens
    return head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 1000])
@pytest.mark.parametrize("factor", [0.37, torch.linspace(0, 2, 10)])
def test_value_and_gradients_equal_cross_entropy(bias: bool, chunk_tokens: int, factor: float | torch.Tensor) -> None:
    head = head_of(bias, chunk_tokens)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (10,))
    total = head(hidden, labels, factor)
    total.backward()
    ours = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    expected = (nn.functional.cross_entropy(head(hidden), labels, reduction="none") * factor).sum()
    expected.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    # The tolerance is that of fp32, in which chunks compute for any weight dtype.
    for a, b in zip(ours, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_small_gradients_are_scaled_before_they_are_rounded() -> None:
    head = head_of(False, 4, torch.float16)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0] = 2.0
    # Each token except token 0 has the probability exp(-20): its gradient is below the smallest fp16 number.
    hidden = torch.full((1, 8), 1.25, dtype=torch.float16)
    head(hidden, torch.zeros(1, dtype=torch.long), 2.0**16).backward()
    expected = 2.0**16 * math.exp(-20) * 1.25
    torch.testing.assert_close(head.weight.grad[1:].float(), torch.full((30, 8), expected), rtol=1e-2, atol=0)


def test_no_label_gives_zero_and_zero_gradients() -> None:
    head = head_of(False, 4)
    hidden = torch.randn(0, 8, dtype=torch.float64, requires_grad=True)
    loss = head(hidden, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()


def test_the_sum_does_not_depend_on_the_chunk() -> None:
    hidden, labels = torch.randn(50, 8), torch.randint(0, 31, (50,))
    sums = {head_of(False, chunk, torch.float32)(hidden, labels).item() for chunk in (1, 7, 50)}
    assert max(sums) - min(sums) < 1e-3


def test_without_gradients_only_the_value_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(False, 4)
    # addmm_ accumulates the weight gradient in a buffer as large as the weights.
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    with pytest.raises(TypeError):
        head(torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 31, (5,)))
    with torch.no_grad():
        loss = head(torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 31, (5,)))
    assert not loss.requires_grad
    assert loss > 0


def test_the_gradient_of_a_bf16_weight_does_not_lose_small_terms_over_chunks() -> None:
    """Each chunk adds little: a bf16 sum would lose it, while an fp32 sum is as accurate as a single product."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2048, 8, dtype=torch.bfloat16) + 1, torch.randint(0, 31, (2048,))
    head = head_of(False, 4, torch.bfloat16)
    exact = LossHead(8, 31, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(head.weight.detach())
    nn.functional.cross_entropy(exact(hidden.double()), labels, reduction="sum").backward()

    def error(gradient: torch.Tensor) -> float:
        return float((gradient.double() - exact.weight.grad).norm() / exact.weight.grad.norm())

    summed = torch.zeros_like(head.weight)
    for chunk in range(0, 2048, 4):
        head.weight.grad = None
        head(hidden[chunk : chunk + 4], labels[chunk : chunk + 4]).backward()
        summed += head.weight.grad
    head.weight.grad = None
    head(hidden, labels).backward()
    assert error(head.weight.grad) < 0.01
    assert error(summed) > 3 * error(head.weight.grad)


def build(device: str = "cpu", uses_liger: bool = False, model_type: str = "llama", **section: object) -> CausalLMLoss:
    config = {**CONFIG, "model_type": model_type}
    settings = ModelSection(init="random", config=config, tokenizer="./tokenizer", **{"dtype": "fp32", **section})
    torch.manual_seed(1)
    return build_model(settings, model_facts(config, None, None, None), device, chunk_tokens=16, uses_liger=uses_liger)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a stand-in package with Liger's name and layout; the arguments replace the content of modules."""

    def write(**files: str) -> None:
        monkeypatch.syspath_prepend(str(write_package(tmp_path / "site", **files)))
        forget()

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
            del sys.modules[name]

    yield write
    liger.undo()
    forget()


def test_a_model_that_is_built_after_training_computes_without_liger(
    install: Callable[..., None], plan_of: PlanOf, tmp_path: Path
) -> None:
    """The export check builds such a model; with Liger, it would report a completed run as failed."""
    without = build()
    expected = without(IDS, POSITIONS)
    install()
    trained = build(uses_liger=True)
    assert trained.liger_problem == ""
    # Liger must not change the random initial weights.
    weights = dict(trained.parameters_by_name())
    for name, weight in without.parameters_by_name().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, msg=name)
    with pytest.raises(RuntimeError, match="Triton"):
        trained(IDS, POSITIONS)
    with pytest.raises((RuntimeError, TypeError)):
        build()(IDS, POSITIONS)
    write_weights(plan_of("export.enabled=false"), RankInfo(0, 0, 1, 1), tmp_path, CPU, Composite([]))
    torch.testing.assert_close(build()(IDS, POSITIONS), expected, rtol=0, atol=0)


UNUSABLE = {
    "the package": ({"__init__": "raise OSError('undefined symbol: _ZN3c104cuda')"}, "OSError: undefined symbol: _ZN3c104cuda"),
    "what it imports late": (
        {"monkey_patch": "raise ImportError('liger-kernel requires transformers >= 6.0.0\\nPlease install ...')"},
        "ImportError: liger-kernel requires transformers >= 6.0.0",
    ),
}


@pytest.mark.parametrize("part", UNUSABLE)
def test_liger_that_cannot_be_used_is_left_out_with_a_reason_or_refused_before_weights_load(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    expected = build()(IDS, POSITIONS)
    files, reason = UNUSABLE[part]
    install(**files)
    model = build(uses_liger=True)
    assert f"({reason})" in model.liger_problem
    torch.testing.assert_close(model(IDS, POSITIONS), expected, rtol=0, atol=0)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(ConfigError, match="Liger cannot be used") as raised:
        build(uses_liger=True, liger=True)
    (problem,) = raised.value.problems
    assert (problem.where, problem.value) == ("model.liger", reason)
    assert problem.remedy.endswith("set model.liger=auto")


def test_ranks_in_an_image_without_liger_train_without_it_and_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    model = build(uses_liger=True)
    assert model(IDS, POSITIONS).isfinite().all()
    config = RunConfig.model_validate({**hand_made.SETTINGS, "cluster": {"kind": "slurm", "container_image": "owner/image:tag"}})
    alert = liger.describe_use(model.liger_problem, config, Path("/runs/tried"))
    install = "install liger-kernel where the ranks run, in their image if they have one: pip install 'launcher[gpu]'"
    assert alert.startswith("training runs without Liger, slower than planned, because it cannot be used (ModuleNotFoundError: ")
    assert alert.endswith(f"): {install}. The plan's memory is for this case")


def test_what_was_replaced_is_put_back_where_applying_fails(install: Callable[..., None]) -> None:
    expected = build()(IDS, POSITIONS)
    install(monkey_patch=APPLIED_IN_PART)
    model = build(uses_liger=True)
    assert "AttributeError: 'LlamaDecoderLayer' object has no attribute 'moved_layernorm'" in model.liger_problem
    torch.testing.assert_close(model(IDS, POSITIONS), expected, rtol=0, atol=0)
    torch.testing.assert_close(build()(IDS, POSITIONS), expected, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="moved_layernorm"):
        build(uses_liger=True, liger=True)
    torch.testing.assert_close(build()(IDS, POSITIONS), expected, rtol=0, atol=0)


@pytest.mark.rest
@pytest.mark.parametrize("files", [{"monkey_patch": "raise ImportError('moved_layernorm')"}, {"monkey_patch": APPLIED_IN_PART}])
def test_all_ranks_train_without_liger_where_one_cannot_use_it(
    rank_server: RankServer, tmp_path: Path, files: dict[str, str]
) -> None:
    sound, broken = write_package(tmp_path / "sound"), write_package(tmp_path / "broken", **files)
    ranks = rank_server.values("train_ranks:build_with_liger", [[str(sound)], [str(broken)]], tmp_path / "ranks")
    for rank in ranks:
        assert "moved_layernorm" in rank["problem"]
        assert "(rank 1: " in rank["problem"]
        assert rank["replaced"] == []
    (both, _) = rank_server.values("train_ranks:build_with_liger", [[str(sound)]] * 2, tmp_path / "both")
    assert (both["problem"], both["replaced"]) == ("", ["LlamaRMSNorm", "forward"])


def test_an_architecture_without_kernels_of_liger_says_so(install: Callable[..., None]) -> None:
    install()
    assert build(uses_liger=True, model_type="olmo").liger_problem == "Liger has no kernels for this architecture (olmo)"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None, reason="needs a GPU and liger-kernel"
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_on_a_gpu_liger_changes_neither_loss_nor_gradients_nor_a_later_model(model_type: str) -> None:
    labels = IDS.roll(-1, dims=1)
    losses, gradients = [], []
    for uses_liger in (False, True):
        model = build("cuda", uses_liger=uses_liger, model_type=model_type).cuda()
        assert model.liger_problem == ""
        loss = model(IDS.cuda(), POSITIONS.cuda(), labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.parameters_by_name().items()})
    liger.undo()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    assert build(model_type=model_type)(IDS, POSITIONS, labels).item() == pytest.approx(losses[0], rel=1e-4)
