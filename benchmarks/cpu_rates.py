"""Measure the compute and memory rates of this machine's CPUs at a plan's shapes; run by benchmarks/predicted_speed.py.

python -m torch.distributed.run --nproc-per-node N benchmarks/cpu_rates.py SHAPES.json

All ranks measure at the same time, as they train. Rank 0 prints one JSON object with its own seconds and rates. Each is the
median of the faster half of several repetitions, because other programs can only add time. Seconds are wall-clock time, or the
CPU time of the rank's process if the shapes file says so.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from steps import faster_half
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Elements of an array that exceeds every cache, as weights and gradients do.
_LARGE = 1 << 24
_REPEATS = 9
_clock = time.perf_counter


def main(path: str) -> None:
    dist.init_process_group("gloo")
    global _clock
    shapes = json.loads(Path(path).read_text())
    _clock = time.process_time if shapes["counts_cpu"] else time.perf_counter
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[shapes["dtype"]]
    tokens, chunk = shapes["tokens"], shapes["chunk_tokens"]
    hidden, inner, vocab = shapes["hidden"], shapes["intermediate"], shapes["vocab"]
    measured = {
        # One layer, and one chunk of the loss.
        "layer_s": sum(_products_s(tokens, *sizes, dtype) for sizes in shapes["products"]),
        "head_s": _products_s(chunk, hidden, vocab, dtype),
        # One document in one layer.
        "attention_s": _attention_s(shapes["doc_tokens"], shapes["heads"], shapes["kv_heads"], shapes["head_dim"], dtype),
        "layer_bytes_per_s": _multiply(torch.rand(tokens, inner).to(dtype)),
        "loss_bytes_per_s": _multiply(torch.rand(chunk, vocab)),
        "copied_bytes_per_s": _copy(dtype),
        "states_bytes_per_s": _update(),
        **_links(dtype),
    }
    if dist.get_rank() == 0:
        print(json.dumps(measured), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _seconds(run: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Return the seconds of a call that all ranks start together."""
    run()
    times = []
    for _ in range(repeats):
        dist.barrier()
        began = _clock()
        run()
        times.append(_clock() - began)
    return faster_half(times)


def _products_s(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """Return the seconds of a linear layer's three products."""
    x, grad = torch.rand(tokens, inputs).to(dtype), torch.rand(tokens, outputs).to(dtype)
    weight = torch.rand(outputs, inputs).to(dtype)

    def run() -> None:
        torch.nn.functional.linear(x, weight)
        grad @ weight
        grad.t() @ x

    return _seconds(run)


def _attention_s(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> float:
    query, key, value = (
        torch.rand(1, count, tokens, head_dim).to(dtype).requires_grad_() for count in (heads, kv_heads, kv_heads)
    )

    def run() -> None:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv_heads)
        torch.autograd.grad(output.sum(), (query, key, value))

    return _seconds(run)


def _multiply(factor: Tensor) -> float:
    """Return the bytes per second of an elementwise product into fresh memory."""
    other = factor.flip(0)
    return 3 * factor.nbytes / _seconds(lambda: factor * other)


def _copy(dtype: torch.dtype) -> float:
    """Return the bytes per second of joining two arrays in fresh memory."""
    parts = [torch.zeros(_LARGE // 2, dtype=dtype), torch.zeros(_LARGE // 2, dtype=dtype)]
    return 2 * sum(part.nbytes for part in parts) / _seconds(lambda: torch.cat(parts))


def _update() -> float:
    """Return the bytes per second of an in-place update of fp32 states."""
    state, gradient = torch.zeros(_LARGE), torch.zeros(_LARGE)
    return 3 * state.nbytes / _seconds(lambda: state.add_(gradient))


def _links(dtype: torch.dtype) -> dict[str, float]:
    """Return the bytes per second that a rank receives in an all-gather, and how much longer a reduction takes."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return {"gathered_bytes_per_s": float("inf"), "reduce_factor": 1.0}
    whole, part = torch.zeros(_LARGE, dtype=dtype), torch.zeros(_LARGE // ranks, dtype=dtype)
    gather_s = _seconds(lambda: dist.all_gather_into_tensor(whole, part), 5)
    reduce_s = _seconds(lambda: dist.reduce_scatter_tensor(part, whole), 5)
    received = whole.nbytes * (ranks - 1) / ranks
    return {"gathered_bytes_per_s": received / gather_s, "reduce_factor": reduce_s / gather_s}


if __name__ == "__main__":
    main(*sys.argv[1:])
