"""The settings that `init` suggests are within published ranges and fit the model, data and machine."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.plan.suggested_settings import DataSample, Machine, learning_rate, needs_offload, suggest, suggest_held_out

GPUS = Machine(world_size=16, device="cuda", memory_gib=79.1)


def sample(num_documents: int = 20_000, mean: float = 400.0, p99: int = 1500, measured: bool = True) -> DataSample:
    return DataSample(num_documents, mean, p99, p99 * 3, measured)


def values(
    data: DataSample, machine: Machine = GPUS, num_params: int = 8_000_000_000, positions: int | None = 32768
) -> dict[str, Any]:
    suggestions = suggest(num_params, positions, data, machine)
    assert all(one.reason for one in suggestions)
    return {one.key: one.value for one in suggestions}


@pytest.mark.parametrize(("num_params", "published"), [(1e9, 3e-5), (7e9, 2e-5), (8e9, 5e-6), (13e9, 5e-6), (70e9, 2e-6)])
def test_the_learning_rate_is_within_a_factor_of_three_of_published_ones(num_params: float, published: float) -> None:
    assert published / 3 <= learning_rate(int(num_params)) <= published * 3


def test_the_learning_rate_falls_with_the_size_and_is_a_round_number() -> None:
    sizes = [10**exponent for exponent in range(6, 13)]
    rates = [learning_rate(size) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-4
    assert (learning_rate(1_000_000_000), learning_rate(70_000_000_000)) == (3e-5, 2e-6)


@pytest.mark.parametrize(("num_documents", "share"), [(10, 0.1), (300, 0.1), (1_000, 0.1), (1_100, 0.1), (2_500, 0.04)])
def test_an_evaluation_gets_a_hundred_documents_of_small_data_but_at_most_a_tenth(num_documents: int, share: float) -> None:
    suggestion = suggest_held_out(num_documents, 0.02)
    assert suggestion is not None
    assert (suggestion.key, suggestion.value) == ("data.eval_fraction", share)


def test_a_share_that_holds_out_enough_documents_stays() -> None:
    assert suggest_held_out(5_000, 0.02) is None
    assert suggest_held_out(300, 0.2) is None
    assert suggest_held_out(9, 0.02) is None, "a tenth is less than a document"


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 8, 24, 64])
@pytest.mark.parametrize("num_documents", [1, 100, 20_000, 5_000_000])
def test_the_batch_divides_over_the_ranks(num_documents: int, world_size: int) -> None:
    machine = Machine(world_size, "cuda", 79.1)
    found = values(sample(num_documents), machine)
    assert found["train.global_batch_size"] % world_size == 0
    assert found["train.global_batch_size"] * found["data.max_length"] <= max(128 * 4096, world_size * found["data.max_length"])
    assert found["optim.warmup_steps"] >= 1


def test_little_data_has_many_steps_and_much_data_the_batch_of_published_runs() -> None:
    few, many = values(sample(2_000)), values(sample(5_000_000))
    assert (few["train.epochs"], few["train.global_batch_size"]) == (3, 16)
    assert (many["train.epochs"], many["train.global_batch_size"] * many["data.max_length"]) == (1, 128 * 4096)
    assert (few["checkpoint.save_every"], few["eval.every"]) == (14, 7)


def test_the_length_holds_99_of_100_documents_within_what_the_model_takes() -> None:
    assert values(sample(p99=3000))["data.max_length"] == 4096
    assert values(sample(p99=3500, measured=False))["data.max_length"] == 8192
    assert values(sample(p99=100))["data.max_length"] == 2048
    assert values(sample(p99=9000), positions=8192)["data.max_length"] == 8192
    assert values(sample(p99=9000), positions=None)["data.max_length"] == 16384
    assert values(sample(p99=100), Machine(2, "cpu", None))["data.max_length"] == 256


def test_memory_decides_about_offload() -> None:
    assert "model.activation_checkpointing" not in values(sample()), "the plan decides"
    assert needs_offload(60.0, GPUS)
    assert not needs_offload(40.0, GPUS)
    assert not needs_offload(60.0, Machine(2, "cpu", None))


def test_what_is_chosen_is_not_suggested_and_the_rest_follows_it() -> None:
    chosen = {"train.epochs": 6, "data.max_length": 4096, "train.global_batch_size": 16}
    found = {one.key: one.value for one in suggest(8_000_000_000, None, sample(), GPUS, chosen)}
    assert not set(chosen) & set(found)
    assert found["checkpoint.save_every"] == math.ceil(400 * 20_000 / 4096 * 6 / 16) // 5
    found = {one.key: one.value for one in suggest(8_000_000_000, None, sample(), GPUS, {"train.max_steps": 50})}
    assert ("train.epochs" in found, found["checkpoint.save_every"]) == (False, 10)
