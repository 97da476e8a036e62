"""In the real model, packed documents do not affect each other, and the loss equals that of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from launcher.config.sections.model import ModelSection
from launcher.data.loader import MicroBatch
from launcher.errors import ConfigError
from launcher.plan.architecture.facts import model_facts
from launcher.train.kernels import attention
from launcher.train.model import CausalLMLoss, build_model, convert_gguf


@pytest.fixture(scope="module")
def real(demo_model: Path) -> CausalLMLoss:
    config = transformers.AutoModelForCausalLM.from_pretrained(demo_model).config.to_dict()
    facts = model_facts(config, str(demo_model), str(demo_model), None)
    section = ModelSection(path=str(demo_model), dtype="fp32")
    return build_model(section, facts, "cpu", chunk_tokens=64).eval()


@pytest.fixture
def set_kernel(real: CausalLMLoss) -> Iterator[Callable[[str, bool], None]]:
    """Set the attention kernel of the real model, and whether its rows are flattened, for one test."""
    before = real.hf.config._attn_implementation, real.flatten

    def set_both(kernel: str, flatten: bool) -> None:
        real.hf.set_attn_implementation(kernel)
        real.flatten = flatten

    yield set_both
    set_both(*before)


def packed(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 40000, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.rest
@torch.no_grad()
@pytest.mark.parametrize(("kernel", "flatten"), [("sdpa", False), ("sdpa", True), ("varlen", True)])
def test_a_perturbed_document_does_not_move_its_neighbors(
    real: CausalLMLoss, set_kernel: Callable[[str, bool], None], kernel: str, flatten: bool
) -> None:
    lengths = [9, 1, 14, 6]
    ids, positions = packed(lengths, seed=1)
    other = ids.clone()
    other[0, 10:24] = packed([14], seed=2)[0]
    set_kernel(kernel, flatten)
    before, after = real(ids, positions), real(other, positions)
    moved = (before - after).abs().amax(-1)[0]
    assert moved[:10].max() == 0
    assert moved[24:].max() == 0
    assert moved[10:24].max() > 1, "the perturbation itself must be seen, or this test shows nothing"


@torch.no_grad()
def test_a_packed_document_gets_the_logits_it_gets_alone(real: CausalLMLoss) -> None:
    ids, positions = packed([9, 14], seed=3)
    alone = real(ids[:, 9:], positions[:, 9:])
    torch.testing.assert_close(real(ids, positions)[:, 9:], alone, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_two_rows_flattened_into_one_compute_the_same(real: CausalLMLoss, set_kernel: Callable[[str, bool], None]) -> None:
    ids, positions = packed([8], seed=4)
    rows, row_positions = torch.cat([ids, ids.flip(1)]), positions.expand(2, -1)
    labels = rows.roll(-1, dims=1)
    labels[:, -1] = -100
    set_kernel("sdpa", False)
    plain = real(rows, row_positions, labels)
    set_kernel("sdpa", True)
    flat = real(rows, row_positions, labels)
    torch.testing.assert_close(plain, flat, rtol=1e-5, atol=1e-3)


def attend_by_cu_seqlens(module, query, key, value, mask, **given):
    """Attend as variable-length FlashAttention does, within the documents of cu_seqlens. Tensors are [1, H, T, D]."""
    assert mask is None
    assert given["cu_seq_lens_q"].dtype == torch.int32
    assert torch.equal(given["cu_seq_lens_q"], given["cu_seq_lens_k"])
    cu_seqlens = given["cu_seq_lens_q"].tolist()
    assert given["max_length_q"] == given["max_length_k"] == max(b - a for a, b in pairwise(cu_seqlens))
    parts = []
    for begin, end in pairwise(cu_seqlens):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
        scale, gqa = given["scaling"], query.shape[1] != key.shape[1]
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa))
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.rest
@pytest.mark.parametrize("recompute", [False, True])
def test_flash_attention_receives_cu_seqlens(
    real: CausalLMLoss, set_kernel: Callable[[str, bool], None], recompute: bool
) -> None:
    """Otherwise transformers computes them on the GPU in every layer. The fake kernel uses only cu_seqlens."""
    transformers.AttentionInterface.register("fake", attend_by_cu_seqlens)
    ids = torch.cat([packed([9, 1, 14], seed=6)[0], packed([24], seed=7)[0]])
    positions = torch.stack([packed([9, 1, 14], seed=6)[1][0], packed([10, 14], seed=7)[1][0]])
    labels = ids.roll(-1, dims=1)
    batch = MicroBatch(ids, positions, labels, (0, 1))
    assert batch.cu_seqlens.tolist() == [0, 9, 10, 24, 34, 48]
    expected = real(ids, positions, labels).item()
    set_kernel("fake", True)
    try:
        real.train()
        if recompute:
            real.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = real(ids, positions, labels, 1.0, batch.cu_seqlens)
        loss.backward()
    finally:
        real.hf.gradient_checkpointing_disable()
        real.zero_grad(set_to_none=True)
        real.eval()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_documents_do_not_see_each_other_in_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_can_import", lambda module: True)
    section = ModelSection(init="random", config={"model_type": "gpt_neo"}, tokenizer="/model", attention="flash_attention_2")
    facts: Any = SimpleNamespace(path=None, config={"model_type": "gpt_neo"})
    with pytest.raises(ConfigError, match=r"set model\.attention=sdpa"):
        build_model(section, facts, "cuda", chunk_tokens=64)


@torch.no_grad()
def test_the_loss_equals_that_of_transformers(real: CausalLMLoss) -> None:
    ids, positions = packed([20], seed=5)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[:, :7] = -100
    logits = real.hf(input_ids=ids, use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0, 7:19], ids[0, 8:20], reduction="sum")
    torch.testing.assert_close(real(ids, positions, labels), expected, rtol=1e-5, atol=1e-3)


def test_recomputed_layers_change_neither_loss_nor_gradients() -> None:
    """Recomputing every second of five layers, or all of them, gives the same results as recomputing none."""
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "vocab_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    facts = model_facts(config, None, None, None)
    section = ModelSection(init="random", config=config, tokenizer="./tokenizer", dtype="fp32")
    ids, positions = packed([9, 7], seed=3)
    ids %= 64
    results = []
    for layers, num_recomputed in (("none", 0), ("every 2", 3), ("all", 5)):
        torch.manual_seed(0)
        model = build_model(section, facts, "cpu", chunk_tokens=8, checkpointing=layers)
        recomputed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
        assert sum(type(module).__name__ == "LlamaDecoderLayer" for module in recomputed) == num_recomputed
        loss = model(ids, positions, ids)
        loss.backward()
        results.append((loss.item(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]))
    (loss, gradients), *others = results
    for other_loss, other_gradients in others:
        assert other_loss == loss
        assert all(torch.equal(one, other) for one, other in zip(gradients, other_gradients, strict=True))


def test_a_gguf_file_in_the_working_directory_is_not_converted_in_place_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks there first for the weights, and the converted model stays in the cache."""
    for folder in ("model", "shared"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tiny.gguf").write_text(folder)
    monkeypatch.chdir(tmp_path / "shared")
    read: list[str] = []

    class Loaded:
        config = SimpleNamespace()

        def save_pretrained(self, folder: Path) -> None:
            pass

    def load(folder: str, gguf_file: str, **options: Any) -> Loaded:
        # Same lookup as transformers.modeling_utils._get_resolved_checkpoint_files.
        read.append((Path(gguf_file) if Path(gguf_file).is_file() else Path(folder, gguf_file)).read_text())
        return Loaded()

    for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", load)
    convert_gguf(Path("../model/tiny.gguf"), tmp_path / "converted")
    assert read == ["model", "model"]
