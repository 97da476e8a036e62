"""Liger computes in the model that trains and in no other; on CPUs a stand-in replaces the same things of transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launcher.config.schema import ModelSection
from launcher.distributed import RankInfo
from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.tracker import Composite
from launcher.train.finish import write_weights
from launcher.train.kernels import liger
from launcher.train.model import CausalLMLoss, build_model

CPU = torch.device("cpu")
CONFIG = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
IDS = torch.arange(24)[None]
POSITIONS = torch.cat([torch.arange(10), torch.arange(14)])[None]
# As Liger's monkey_patch.py: classes and functions of the modeling module, and the methods of the instance.
STAND_IN = """
from types import MethodType

def fail(*_, **__):
    raise RuntimeError("Triton is asked to compute on a CPU")

def _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy, cross_entropy):
    assert not fused_linear_cross_entropy and not cross_entropy
    if model.config.model_type != "llama":
        return
    from transformers.models.llama import modeling_llama

    class LigerRMSNorm(modeling_llama.LlamaRMSNorm):
        forward = fail

    norms = [module for module in model.modules() if type(module) is modeling_llama.LlamaRMSNorm]
    modeling_llama.LlamaRMSNorm = LigerRMSNorm
    modeling_llama.apply_rotary_pos_emb = fail
    for norm in norms:
        norm.forward = MethodType(fail, norm)
"""


def build(device: str = "cpu", uses_liger: bool = False, model_type: str = "llama", **section: object) -> CausalLMLoss:
    config = {**CONFIG, "model_type": model_type}
    settings = ModelSection(init="random", config=config, tokenizer="./tokenizer", **{"dtype": "fp32", **section})
    torch.manual_seed(1)
    return build_model(settings, model_facts(config, None, None, None), device, chunk_tokens=16, uses_liger=uses_liger)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a package of Liger's name, with this source."""

    def write(source: str) -> None:
        package = tmp_path / "site" / "liger_kernel"
        (package / "transformers").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "transformers/__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(package.parent))
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    liger.undo()
    for name in ("liger_kernel", "liger_kernel.transformers"):
        sys.modules.pop(name, None)


def test_a_model_that_is_built_after_training_computes_without_liger(
    install: Callable[[str], None], plan_of: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    """As the check of the export does, which otherwise reports a completed run as failed."""
    expected = build()(IDS, POSITIONS)
    install(STAND_IN)
    trained = build(uses_liger=True)
    assert trained.liger_problem == ""
    with pytest.raises(RuntimeError, match="Triton"):
        trained(IDS, POSITIONS)
    with pytest.raises(RuntimeError, match="Triton"):
        build()(IDS, POSITIONS)
    write_weights(plan_of("export.enabled=false"), RankInfo(0, 0, 1, 1), tmp_path, CPU, Composite([]))
    torch.testing.assert_close(build()(IDS, POSITIONS), expected, rtol=0, atol=0)


def test_liger_that_cannot_be_imported_is_left_out_with_a_reason_or_refused(install: Callable[[str], None]) -> None:
    install("raise OSError('undefined symbol: _ZN3c104cuda')")
    problem = build(uses_liger=True).liger_problem
    assert problem == (
        "training is without Liger, slower and with more memory than planned: "
        "it cannot be imported (OSError: undefined symbol: _ZN3c104cuda)"
    )
    with pytest.raises(ConfigError, match="undefined symbol") as raised:
        build(uses_liger=True, liger=True)
    assert raised.value.problems[0].where == "model.liger"


def test_an_architecture_without_kernels_of_liger_says_so(install: Callable[[str], None]) -> None:
    install(STAND_IN)
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
