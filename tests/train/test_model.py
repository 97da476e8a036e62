"""The real model: documents packed into one row do not see each other, and its loss is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.config.schema import ModelSection
from launcher.plan.architecture import model_facts
from launcher.train.model import CausalLMLoss, build_model


@pytest.fixture(scope="module")
def real(demo_model: Path) -> CausalLMLoss:
    config = AutoModelForCausalLM.from_pretrained(demo_model).config.to_dict()
    facts = model_facts(config, str(demo_model), str(demo_model), None)
    section = ModelSection(path=str(demo_model), dtype="fp32")
    return build_model(section, facts, "cpu", chunk_tokens=64).eval()


def packed(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 40000, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(n) for n in lengths])[None]


@torch.no_grad()
@pytest.mark.parametrize("flatten", [False, True])
def test_a_perturbed_document_does_not_move_its_neighbours(real: CausalLMLoss, flatten: bool) -> None:
    lengths = [9, 1, 14, 6]
    ids, positions = packed(lengths, seed=1)
    other = ids.clone()
    other[0, 10:24] = packed([14], seed=2)[0]
    real.flatten = flatten
    before, after = real(ids, positions), real(other, positions)
    real.flatten = False
    moved = (before - after).abs().amax(-1)[0]
    assert moved[:10].max() == 0
    assert moved[24:].max() == 0
    assert moved[10:24].max() > 1, "the perturbation itself must be seen, or this test shows nothing"


@torch.no_grad()
def test_a_packed_document_computes_what_it_computes_alone(real: CausalLMLoss) -> None:
    ids, positions = packed([9, 14], seed=3)
    alone = real(ids[:, 9:], positions[:, 9:])
    torch.testing.assert_close(real(ids, positions)[:, 9:], alone, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_two_rows_flattened_into_one_compute_the_same(real: CausalLMLoss) -> None:
    ids, positions = packed([8], seed=4)
    rows, row_positions = torch.cat([ids, ids.flip(1)]), positions.expand(2, -1)
    labels = rows.roll(-1, dims=1)
    labels[:, -1] = -100
    plain = real(rows, row_positions, labels)
    real.flatten = True
    flat = real(rows, row_positions, labels)
    real.flatten = False
    torch.testing.assert_close(plain, flat, rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_the_loss_is_the_models_own(real: CausalLMLoss) -> None:
    ids, positions = packed([20], seed=5)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[:, :7] = -100
    logits = real.hf(input_ids=ids, use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0, 7:19], ids[0, 8:20], reduction="sum")
    torch.testing.assert_close(real(ids, positions, labels), expected, rtol=1e-5, atol=1e-3)
