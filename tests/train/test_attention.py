"""Attention kernels: which one is chosen, and that attention within documents equals that of transformers."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError
from launcher.train import attention
from launcher.train.model import CausalLMLoss, build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
LENGTHS = [30, 1, 41, 8]
# If torch's varlen kernel lacks these parameters, the launcher uses SDPA instead.
HAS_VARLEN = attention._varlen_parameters() >= {"scale", "window_size"}
needs_varlen = pytest.mark.skipif(not HAS_VARLEN, reason="needs a torch with variable-length attention")


def build(family: str, **own: Any) -> CausalLMLoss:
    torch.manual_seed(0)
    attention.register_varlen()
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **own})
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return CausalLMLoss(hf, flatten=False).eval()


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {"num_key_value_heads": 2}),
        # A sliding window of 8 tokens in every second layer, with documents of up to 41 tokens.
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}),
        # Keys and values have different head dimensions.
        (
            "deepseek_v3",
            {
                **{"num_key_value_heads": 4, "first_k_dense_replace": 2, "kv_lora_rank": 16, "q_lora_rank": 16},
                **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8},
            },
        ),
    ],
)
def test_varlen_computes_the_logits_and_gradients_of_sdpa(family: str, own: dict[str, Any]) -> None:
    model = build(family, **own)
    ids = torch.randint(97, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    results = []
    for kernel, flatten in (("sdpa", False), (attention.VARLEN, True)):
        model.hf.set_attn_implementation(kernel)
        model.flatten = flatten
        logits = model(ids, positions).reshape(2, -1, 97)
        logits.square().mean().backward()
        results.append((logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0][1], "there are gradients to compare"


def test_a_document_of_varlen_is_computed_alike_in_every_row() -> None:
    model = build("llama", num_key_value_heads=2)
    model.hf.set_attn_implementation(attention.VARLEN)
    model.flatten = True
    ids = torch.randint(97, (1, 60), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(20), torch.arange(40)])[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, positions)[:, 20:], model(ids[:, 20:], positions[:, 20:]), rtol=1e-5, atol=1e-6)


def attend_by_the_manual(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """Compute varlen_attn as torch documents it: tensors are [T, H, D], windows are (left, right), -1 is unlimited."""
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == int(cu_q.diff().max())
    if not enable_gqa:
        assert query.shape[1] == key.shape[1]
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    parts = []
    for start, stop in pairwise(cu_q.tolist()):
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        left, right = (stop if side == -1 else side for side in window_size)
        pairs = (q @ k.transpose(1, 2) * scale).masked_fill((distance > left) | (-distance > right), float("-inf"))
        parts.append((pairs.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@needs_varlen
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("has_gqa", [True, False])
def test_the_kernel_for_gpus_gets_the_arguments_that_it_documents(
    monkeypatch: pytest.MonkeyPatch, is_causal: bool, window: int | None, has_gqa: bool
) -> None:
    """Values are smaller than keys, and heads are grouped even if the kernel's signature lacks enable_gqa."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_by_the_manual)
    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset({"enable_gqa"} if has_gqa else ()))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 80, dim, generator=generator) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    cu_seqlens = torch.tensor([0, 30, 31, 72, 80], dtype=torch.int32)
    arguments = {"scaling": 0.3, "sliding_window": window, "is_causal": is_causal, "cu_seq_lens_q": cu_seqlens}
    expected, _ = attention.attend_within_documents(torch.nn.Identity(), query, key, value, None, **arguments)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    attended, _ = attention.attend_within_documents(torch.nn.Identity(), query, key, value, None, **arguments)
    assert attended.shape == (1, 80, 4, 6)
    torch.testing.assert_close(attended, expected)


@needs_varlen
def test_the_kernel_for_gpus_takes_the_tensors_that_it_gets() -> None:
    """With fake tensors, torch checks the real operator's arguments and shapes, forward and backward."""
    with FakeTensorMode():
        query = torch.empty(80, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(80, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        value = torch.empty(80, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        attended = attention._varlen_on_gpu(query, key, value, torch.empty(5, dtype=torch.int32), 41, 0.125, (-1, 0))
        attended.sum().backward()
        assert attended.shape == query.shape
        assert key.grad is not None
        assert key.grad.shape == key.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not {"scale", "window_size"} <= attention._varlen_parameters(), reason="this torch lacks the kernel")
@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_on_a_gpu_computes_what_the_cpu_computes(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = (8, 2, 2)
    tensors = [torch.randn(1, n, sum(LENGTHS), 64, generator=generator, dtype=torch.float64) for n in heads]
    cu_seqlens = torch.tensor([0, 30, 31, 72, 80], dtype=torch.int32)
    results = []
    for device, dtype in ((CPU, torch.float64), (CUDA, torch.bfloat16)):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
        attended, _ = attention.attend_within_documents(
            torch.nn.Identity(), *inputs, None, sliding_window=window, cu_seq_lens_q=cu_seqlens.to(device)
        )
        attended.square().sum().backward()
        results.append([attended.detach().double().cpu(), *(tensor.grad.double().cpu() for tensor in inputs)])
    for expected, computed in zip(*results, strict=True):
        assert (expected - computed).norm() < 0.02 * expected.norm()


def test_varlen_refuses_what_would_change_the_result() -> None:
    tensors = [torch.zeros(1, 2, 4, 8)] * 3
    with pytest.raises(ValueError, match="varlen does not support a mask"):
        attention.attend_within_documents(torch.nn.Identity(), *tensors, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="varlen does not support softcap"):
        attention.attend_within_documents(torch.nn.Identity(), *tensors, None, softcap=30.0)


@pytest.mark.parametrize(
    ("dtype", "family", "installed", "major", "kernel"),
    [
        ("bf16", "llama", (2,), 8, "flash_attention_2"),
        ("bf16", "llama", (2, 3, 4), 8, "flash_attention_2"),
        ("bf16", "llama", (2, 3), 9, "flash_attention_3"),
        ("bf16", "llama", (2, 3, 4), 9, "flash_attention_4"),
        ("bf16", "llama", (3,), 10, "varlen"),
        ("bf16", "llama", (), 9, "varlen"),
        ("fp32", "llama", (2,), 9, "sdpa"),
        ("bf16", "bloom", (2,), 9, "eager"),
        # These models need features that varlen lacks: chunked attention, logit softcapping, sinks, dropout.
        ("bf16", "llama4_text", (), 9, "sdpa"),
        ("fp32", "gemma2", (2,), 9, "eager"),
        ("bf16", "gpt_oss", (), 9, "eager"),
        ("bf16", "gpt_neo", (2,), 9, "eager"),
    ],
)
def test_the_fastest_kernel_that_computes_a_model_exactly_is_chosen(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, family: str, installed: tuple[int, ...], major: int, kernel: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(attention, "_can_import", lambda module: True)
    for number in (2, 3, 4):
        monkeypatch.setattr(f"transformers.utils.is_flash_attn_{number}_available", lambda number=number: number in installed)
    section, config = ModelSection(path="/model", dtype=dtype), transformers.AutoConfig.for_model(family)
    assert attention.choose_kernel(section, CUDA, config) == ("sdpa" if kernel == "varlen" and not HAS_VARLEN else kernel)
    on_cpu = "eager" if family in ("bloom", "gemma2", "gpt_neo", "gpt_oss") else "sdpa" if family == "llama4_text" else "varlen"
    assert attention.choose_kernel(section, CPU, config) == on_cpu
    eager = ModelSection(path="/model", dtype=dtype, attention="eager")
    assert attention.choose_kernel(eager, CUDA, config) == "eager"


def test_a_flash_attention_that_cannot_be_imported_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A build for another torch version fails only when it is imported."""
    (tmp_path / "flash_attn.py").write_text('raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    attention._can_import.cache_clear()
    section, config = ModelSection(path="/model", dtype="bf16"), transformers.AutoConfig.for_model("llama")
    assert attention.choose_kernel(section, CUDA, config) == ("varlen" if HAS_VARLEN else "sdpa")


def test_flash_attention_of_the_hub_does_not_take_the_place_of_a_package() -> None:
    """The package `kernels` imports the newest repository version, or code from a cache that others may be able to write."""
    section, config = ModelSection(path="/model", dtype="bf16", attention="flash_attention_3"), transformers.LlamaConfig()
    with pytest.raises(ConfigError, match="flash_attention_3 is not installed here"):
        attention.choose_kernel(section, CUDA, config)


def test_a_kernel_that_is_slow_for_packed_documents_is_named() -> None:
    config = transformers.AutoConfig.for_model("llama")
    for kernel, packing, is_slow in (("varlen", True, False), ("sdpa", True, True), ("sdpa", False, False)):
        config._attn_implementation = kernel
        assert attention.describe(config, packing).startswith(f"attention is computed by {kernel}")
        assert ("flash-attn" in attention.describe(config, packing)) == is_slow


def test_varlen_is_refused_where_it_would_compute_another_attention() -> None:
    section = ModelSection(init="random", config={"model_type": "gemma2"}, tokenizer="/model", attention="varlen", dtype="fp32")
    facts: Any = SimpleNamespace(path=None, config={"model_type": "gemma2"})
    with pytest.raises(ConfigError, match=r"varlen does not compute this architecture[\s\S]*set model\.attention=auto"):
        build_model(section, facts, "cpu", chunk_tokens=64)
