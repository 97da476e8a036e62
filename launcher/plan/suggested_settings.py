"""Suggests initial settings for a model, data and machine, each with its reason. Pure.

The learning rate, the batch, the epochs and the warm-up follow published full-parameter fine-tunes:

    SmolLM2 135M, 360M   1e-3, 2 epochs          alignment-handbook, recipes/smollm2/sft/config_smol.yaml
    OLMo 2 1B            3e-5, 128 x 4,096       open-instruct, docs/olmo2.md: 2 epochs, warm-up 3%, no weight decay
    OLMo 2 7B            2e-5, 128 x 4,096       open-instruct, scripts/train/olmo2/finetune_7b.sh (64 GPUs x 1 x 2): 2 epochs
    OLMo 2 13B           5e-6, 64 x 4,096        open-instruct, scripts/train/olmo2/finetune_13b.sh (64 GPUs x 1 x 1): 2 epochs
    Tulu 3 8B, 70B       5e-6, 2e-6, 128 x 4,096 model card of allenai/Llama-3.1-Tulu-3-8B-SFT; Lambert et al., arXiv:2411.15124

The learning rate is the power law through OLMo 2 1B and Tulu 3 70B, at most 1e-4. All of these rates except SmolLM2's are within
a factor of three of it. Outside 1 to 70 billion parameters it is extrapolated, and the displayed reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.plan.quantities import format_count

_RATE_OF_1B, _RATE_EXPONENT, _MAX_RATE = 3e-5, -0.64, 1e-4
_RATE_SOURCE = "those of OLMo 2 1B (3e-5) and Tulu 3 70B (2e-6), arXiv:2501.00656 and 2411.15124"
# Sizes of the models that are named 1B and 70B.
_PUBLISHED_SIZES = (0.9e9, 75e9)
_ROUND_RATES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
# As in OLMo 2 1B and Tulu 3: 128 rows of 4,096 tokens. A CPU would take minutes for such a step.
_MAX_STEP_TOKENS = {"cuda": 128 * 4096, "cpu": 8192}
# Minimum number of optimizer steps for a run on little data, if its batch can be that small.
_MIN_STEPS = 100
_WARMUP_SHARE = 0.03
_LENGTHS = {"cuda": (2048, 32768), "cpu": (256, 4096)}
# Counting tokens by characters may underestimate them.
_ESTIMATE_MARGIN = 1.25
_NUM_EVALUATIONS, _NUM_CHECKPOINTS = 10, 5
# Held-out documents for an evaluation, and the largest share of the data that they may take.
_HELD_OUT_DOCUMENTS, _MAX_HELD_OUT_SHARE = 100, 0.1
# Share of a GPU that model states may take; activations and gathered weights need the rest.
_MAX_STATES_SHARE = 0.7


@dataclass(frozen=True)
class DataSample:
    """Statistics of a data sample: documents, and tokens per document; `is_measured` is False if characters were counted."""

    num_documents: int
    mean_tokens: float
    p99_tokens: int
    longest_tokens: int
    is_measured: bool


@dataclass(frozen=True)
class Machine:
    """Where the run will execute: its data ranks, cuda or cpu, and the memory of one device in GiB."""

    data_ranks: int
    device: str
    memory_gib: float | None


@dataclass(frozen=True)
class Suggestion:
    """A setting, its value, and the reason for the value."""

    key: str
    value: Any
    reason: str


def suggest(
    num_params: int, max_positions: int | None, data: DataSample, machine: Machine, chosen: Mapping[str, Any]
) -> list[Suggestion]:
    """Return suggested settings, except those that are `chosen`; dependent settings follow the chosen values."""
    # The power of two that holds 99 of 100 documents, within the limits of the model and the device.
    low, high = _LENGTHS[machine.device]
    tokens = data.p99_tokens * (1 if data.is_measured else _ESTIMATE_MARGIN)
    length = min(high, max(low, 1 << max(4, math.ceil(math.log2(max(1, tokens))))))
    length = chosen.get("data.max_length") or (min(length, max_positions) if max_positions else length)
    counted = "tokens" if data.is_measured else "tokens, estimated from characters"
    of_length = f"99 of 100 documents have up to {data.p99_tokens:,} {counted}; rows are packed with several documents"
    if data.longest_tokens > length:
        of_length += f", and the end of longer ones (up to {data.longest_tokens:,}) is cut off"
    of_length += f"; the model takes {max_positions:,}" if max_positions == length else ""

    epochs = chosen.get("train.epochs") or (1 if data.num_documents >= 1_000_000 else 2 if data.num_documents >= 10_000 else 3)
    documents = format_count(data.num_documents, "document")
    of_epochs = {
        1: f"{data.num_documents:,} documents: a second pass adds little",
        2: f"as OLMo 2 and Tulu 3, for {data.num_documents:,} documents; the held-out loss shows when more would overfit",
    }.get(epochs, f"only {documents}; watch the held-out loss, which rises when the model overfits")

    # A multiple of the ranks with as many tokens per step as in published runs, or fewer if the data has few rows.
    rows = max(1, math.ceil(data.mean_tokens * data.num_documents / length))
    most_tokens = _MAX_STEP_TOKENS[machine.device]
    per_rank = max(1, min(most_tokens // length, math.ceil(rows * epochs) // _MIN_STEPS) // machine.data_ranks)
    batch = chosen.get("train.global_batch_size") or machine.data_ranks * (1 << (per_rank.bit_length() - 1))
    steps = chosen.get("train.max_steps") or max(1, math.ceil(rows * epochs / batch))
    of_steps = f"about {format_count(steps, 'step')}"
    why = f"published runs have about {most_tokens:,} tokens in a step" if machine.device == "cuda" else "small, for a CPU"
    why += f"; fewer here, for {of_steps}" if batch * length < most_tokens // 2 else ""
    ranks = format_count(machine.data_ranks, "rank")
    of_batch = f"rows of a step: a multiple of {ranks}, {batch * length:,} tokens; {why}"

    smallest, largest = _PUBLISHED_SIZES
    is_published = smallest <= num_params <= largest
    source = f"between {_RATE_SOURCE}" if is_published else f"extrapolated from {_RATE_SOURCE}; try a few"
    # With three digits, 999,900,000 would be 1.00 billion.
    size = f"{num_params / 1e9:.2f} billion" if num_params >= 999.5e6 else f"{num_params / 1e6:.3g} million"

    suggestions = [
        Suggestion("data.max_length", length, of_length),
        Suggestion("train.epochs", epochs, of_epochs),
        Suggestion("train.global_batch_size", batch, of_batch),
        Suggestion("optim.lr", learning_rate(num_params), f"for {size} parameters: {source}"),
        Suggestion("optim.warmup_steps", max(1, round(steps * _WARMUP_SHARE)), f"3% of {of_steps}; as OLMo 2 and Tulu 3"),
        Suggestion("eval.every", steps // _NUM_EVALUATIONS, f"a tenth of {of_steps}, and before and after training"),
        Suggestion("checkpoint.save_every", steps // _NUM_CHECKPOINTS, f"a fifth of {of_steps}, and at the end"),
    ]
    if "train.max_steps" in chosen:
        suggestions = [one for one in suggestions if one.key != "train.epochs"]
    return [one for one in suggestions if one.key not in chosen]


def suggest_held_out(num_documents: int, share: float) -> Suggestion | None:
    """Return a larger share of held-out documents if `share` of the documents is too few for an evaluation, otherwise None."""
    wanted = min(_MAX_HELD_OUT_SHARE, math.ceil(100 * _HELD_OUT_DOCUMENTS / max(1, num_documents)) / 100)
    if wanted <= share or wanted * num_documents < 1:
        return None
    count = format_count(round(wanted * num_documents), "document")
    reason = f"{count} for the held-out loss and for evaluate, which cannot tell from a few answers whether training helped"
    return Suggestion("data.eval_fraction", wanted, reason)


def learning_rate(num_params: int) -> float:
    """Return a peak learning rate for a full-parameter fine-tune of a model of this size, as a round number."""
    rate = min(_MAX_RATE, _RATE_OF_1B * (num_params / 1e9) ** _RATE_EXPONENT)
    unit = 10 ** math.floor(math.log10(rate))
    return float(f"{min(_ROUND_RATES, key=lambda r: abs(math.log(rate / (r * unit)))) * unit:.1e}")


def needs_offload(states_gib: float, machine: Machine) -> bool:
    """Return whether model states leave too little of a GPU for activations and gathered weights."""
    return machine.device == "cuda" and machine.memory_gib is not None and states_gib > _MAX_STATES_SHARE * machine.memory_gib
