"""In the real model, packed documents do not affect each other, and the loss equals that of transformers.

Compiled decoder layers, which ZeRO-3 gathers as a whole: real ranks get the same training results.

Ranks refuse missing weights and wrong shapes, in case the submit side did not.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from forked_ranks import RankServer
from plan_fixtures import PlanOf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from weight_tools import ROUTER_BUFFER, change_weights, save_model, without

from launcher.config.sections.model import ModelSection
from launcher.data.loader import MicroBatch
from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts
from launcher.train import attention, liger
from launcher.train.model import DTYPES, CausalLMLoss, build_model, compile_layers, convert_gguf

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
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


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


@pytest.mark.compiler
@pytest.mark.rest
def test_compiled_layers_train_as_single_modules_do(rank_server: RankServer, plan_of: PlanOf, tmp_path: Path) -> None:
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
def test_on_a_gpu_compiled_layers_compute_what_others_do(plan_of: PlanOf, uses_liger: bool) -> None:
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
        compile_layers(without_layers(0), torch.device("cpu"))
    assert "model.compile=false" in raised.value.problems[0].remedy


def test_layers_that_cannot_be_told_from_other_modules_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        compile_layers(without_layers(2), torch.device("cpu"))
    assert raised.value.problems[0].where == "model.compile"


def test_a_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "llama"})
    config = json.loads((folder / "config.json").read_text())
    facts = model_facts(config, str(folder), None, None)
    change_weights(folder, without("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"lack 1 tensor of the model: model\.norm\.weight"):
        build_model(ModelSection(path=str(folder)), facts, "cpu", chunk_tokens=64)
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}))
    build_model(ModelSection(path=str(folder)), facts, "cpu", chunk_tokens=64)


@pytest.mark.rest
def test_ranks_under_zero3_refuse_weights_that_do_not_cover_the_model(rank_server: RankServer, tmp_path: Path) -> None:
    complete = save_model(tmp_path / "complete", {"model_type": "llama", "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(complete / "model.safetensors")
    fused = save_model(tmp_path / "fused", {"model_type": "mixtral"})
    lacking = save_model(tmp_path / "lacking", {"model_type": "llama"})
    change_weights(lacking, without("model.norm.weight"))
    expert = save_model(tmp_path / "expert", {"model_type": "mixtral"})
    change_weights(expert, without(EXPERT))
    shape = save_model(tmp_path / "shape", {"model_type": "llama"})
    change_weights(shape, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    cut = save_model(tmp_path / "cut", {"model_type": "qwen3_moe"}) / "model.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    misshapen = save_model(tmp_path / "misshapen", {"model_type": "mixtral"})
    change_weights(misshapen, lambda tensors: tensors.update({EXPERT: torch.zeros(3, 5)}))
    cases = [(str(folder), False) for folder in (complete, fused, lacking, expert, shape, cut.parent, misshapen)]
    (first, loaded), (second, not_counted) = rank_server.values(
        "train_ranks:build_models", [[cases], [cases]], tmp_path / "ranks"
    )
    assert (loaded[:2], not_counted[:2]) == ([num_bytes(complete), num_bytes(fused)],) * 2
    assert not any(not_counted[2:]), "only rank 0 reads what lacks something or has another shape"
    lacks = "model.path: the weight files lack 1 tensor of the model: "
    assert first[:4] == second[:4] == [None, None, lacks + "model.norm.weight", lacks + EXPERT]
    # Only rank 0 compares shapes, and its failure ends the run.
    assert "the weight files do not fit the model: size mismatch for model.norm.weight" in str(first[4])
    assert first[5] == second[5]
    assert "model.safetensors is not a complete safetensors file: " in str(first[5])
    for problems in (first, second):
        assert "Failed to apply weight conversion for 'model.layers.1.mlp.experts.gate_up_proj'" in str(problems[6])


@pytest.mark.rest
def test_each_rank_reads_its_own_part_of_the_weights_alone(rank_server: RankServer, tmp_path: Path) -> None:
    """The weights equal those that transformers loads: two dtypes, shards, experts stored separately and fused, buffers, hpZ."""
    sharded, already_fused = {"max_shard_size": "4KB"}, {"save_original_format": False}
    kinds: list[tuple[str, torch.dtype, dict[str, Any], str, int]] = [
        ("llama", torch.float32, {}, "fp32", 1),
        ("llama", torch.bfloat16, sharded, "fp32", 1),
        ("qwen3_moe", torch.bfloat16, sharded, "fp32", 1),
        ("qwen3_moe", torch.float32, already_fused, "bf16", 1),
        ("mixtral", torch.float32, {}, "fp32", 1),
        ("olmoe", torch.float32, sharded, "bf16", 1),
        ("deepseek_v3", torch.bfloat16, {}, "bf16", 1),
        ("llama", torch.bfloat16, {}, "bf16", 2),
    ]
    cases, sizes = [], []
    for number, (model_type, stored, saving, dtype, hpz_ranks) in enumerate(kinds):
        folder = save_model(tmp_path / str(number), {"model_type": model_type, "dtype": stored}, **saving)
        if model_type == "deepseek_v3":
            change_weights(folder, lambda tensors: [tensors[name].normal_() for name in tensors if name.endswith(ROUTER_BUFFER)])
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        assert (len(files) > 1) == (saving is sharded)
        separate = any(".experts.1." in name for tensors in files for name in tensors)
        assert separate == (model_type != "llama" and saving is not already_fused)
        expected = tmp_path / f"{number}.safetensors"
        save_file(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).state_dict(), expected)
        cases.append([str(folder), str(expected), dtype, hpz_ranks])
        # Each rank reads all of a buffer.
        reads = {
            name: tensor.nbytes * (1 + name.endswith(ROUTER_BUFFER)) for tensors in files for name, tensor in tensors.items()
        }
        sizes.append(sum(reads.values()))
    ranks = rank_server.values("train_ranks:read_own_parts", [[cases]] * 2, tmp_path / "ranks")
    for kind, size, *results in zip(kinds, sizes, *ranks, strict=True):
        assert [differing for _, _, differing in results] == [[], []], kind
        assert sum(num for num, _, _ in results) == size, kind
        assert all(abs(num - size / 2) < 16 and largest <= size / 4 for num, largest, _ in results), kind


def num_bytes(folder: Path) -> int:
    """Count the bytes of the weights in a model folder."""
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.rest
def test_weights_that_a_checkpoint_replaces_are_not_read(rank_server: RankServer, tmp_path: Path) -> None:
    llama = save_model(tmp_path / "llama", {"model_type": "llama", "tie_word_embeddings": True})
    change_weights(llama, without("model.norm.weight"))
    deepseek = save_model(tmp_path / "deepseek", {"model_type": "deepseek_v3"})
    assert any(name.endswith(ROUTER_BUFFER) for name in load_file(deepseek / "model.safetensors"))
    gemma = save_model(tmp_path / "gemma", {"model_type": "gemma3_text"})
    cases = [(str(folder), True) for folder in (llama, deepseek, gemma)]
    (problems, loaded), _ = rank_server.values("train_ranks:build_models", [[cases], [cases]], tmp_path / "ranks")
    assert problems == [None] * 3
    assert loaded == [0, 0, 0]
