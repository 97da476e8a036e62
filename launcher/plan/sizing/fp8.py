"""Linear layers in FP8 (model.fp8): where they can be used, and what the plan assumes about their memory and speed. Pure.

Ranks compute them with torchao (launcher/train/kernels/fp8.py). The rates and bytes below follow from its code and from published
runs; no GPU was measured. With fake tensors, casts that are not compiled take 0 to 30% less than their bytes here.
benchmarks/gpu.py measures the rates for the row of a GPU in launcher/plan/gpu_types.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from launcher.config.schema import RunConfig
from launcher.errors import Problem
from launcher.plan.architecture.layers import Experts, attention_sizes, experts_by_layer
from launcher.plan.gpu_types import GPUS, GpuType, lookup
from launcher.plan.launch_plan import ModelFacts, Topology
from launcher.plan.sizing.activations import Kernels

# Tensor cores accept only matrices whose sizes are multiples of this.
MULTIPLE = 16
# Types that have FP8 units but no products with one scale per row: Ada, and AMD's, whose FP8 is another format.
_WITHOUT_ROW_SCALES = ("L4", "L40S", "RTX-4090", "MI300X", "MI325X")
# The share of its peak that FP8 reaches, relative to the share that bf16 reaches of its own, which is half as high; casts are
# included. Assumed for GPUs whose rows have no measured speed. Compiled, products are 1.1 times as fast as in bf16: torchtitan
# measured 1.11 for a whole step with torchao's row-wise scales (Llama 3 8B on 8 H100: 6,412 against 5,760 tokens/s; commit
# 7a04053). Not compiled, a cast moves about 36 bytes per element, and products take twice as long as in bf16.
_COMPILED_SHARE, _EAGER_SHARE = 0.55, 0.25
# Bytes per element that a cast holds in addition to its result if it is not compiled: two copies in fp32.
_EAGER_CAST = 8


def fp8_problems(config: RunConfig, model: ModelFacts, topology: Topology, gpu_name: str) -> Iterator[Problem]:
    """Yield the reasons why model.fp8 cannot be used, as far as they are known before the ranks try it."""
    if not config.model.fp8:
        return
    where, without = "model.fp8", "set model.fp8=false"
    if topology.device != "cuda":
        yield Problem("model.fp8=true needs GPUs, and this run computes on CPUs", where, "true", without)
        return
    gpu = lookup(gpu_name)
    if gpu is not None and not _scales_rows(gpu):
        able = ", ".join(name for name, one in GPUS.items() if _scales_rows(one))
        message = "model.fp8=true needs a Hopper or Blackwell GPU"
        yield Problem(message, where, gpu_name, f"{without}, or use one of {able}")
    if config.model.dtype != "bf16":
        message = f"model.fp8=true computes everything else in bf16, and model.dtype is {config.model.dtype}"
        yield Problem(message, where, "true", f"set model.dtype=bf16, or {without.removeprefix('set ')}")
    if model.hidden_size % MULTIPLE:
        message = f"FP8 needs matrices whose sizes are multiples of {MULTIPLE}, and no linear layer of this model has such sizes"
        yield Problem(message, where, f"hidden_size {model.hidden_size}", without)


def fp8_warning(config: RunConfig) -> str | None:
    """Return a warning about a probable mistake with model.fp8, None if there is none."""
    if config.model.fp8 and not config.model.compile:
        return (
            "model.fp8=true without model.compile=true is expected to be slower than bf16, because casts to FP8 that are not "
            "compiled pass through memory several times: set model.compile=true"
        )
    return None


def fp8_share(model: ModelFacts, num_weights: float) -> float:
    """Return the share of `num_weights`, the weights that multiply a token in decoder layers, that is multiplied in FP8.

    Experts are not linear layers, and routers are excluded.
    """
    converted = sum(
        count * rows * columns
        for experts, count in Counter(experts_by_layer(model)).items()
        for rows, columns in _linear_layers(model, experts)
        if rows % MULTIPLE == 0 and columns % MULTIPLE == 0
    )
    return min(1.0, converted / num_weights) if num_weights else 0.0


def fp8_speed(gpu: GpuType, kernels: Kernels) -> float:
    """Return the speed of products in FP8 relative to bf16, casts included."""
    share, measured = (_COMPILED_SHARE, gpu.fp8_speed) if kernels.compiled else (_EAGER_SHARE, gpu.fp8_eager_speed)
    return (gpu.fp8 or gpu.bf16) / gpu.bf16 * share if measured is None else measured


def fp8_bytes(model: ModelFacts, tokens: int, kernels: Kernels) -> int:
    """Return the bytes of casts at the peak of a layer's backward pass, in its widest linear layer; 0 without FP8.

    For sizes R x C and T tokens, these exist at the same time: the gradient twice (TR each, scaled by row and by column), the
    weight (RC) and the input (TC), and the gradient and the input once more, because each product needs its own layout.
    """
    if not kernels.fp8:
        return 0
    return max(
        _cast_bytes(rows, columns, tokens, kernels.compiled)
        for experts in set(experts_by_layer(model))
        for rows, columns in _linear_layers(model, experts)
    )


def _cast_bytes(rows: int, columns: int, tokens: int, is_compiled: bool) -> int:
    held = rows * columns + 3 * tokens * rows + 2 * tokens * columns
    if is_compiled:
        return held
    in_fp32 = max(tokens * rows, rows * columns)
    return max(held, rows * columns + 2 * tokens * rows + _EAGER_CAST * in_fp32)


def _scales_rows(gpu: GpuType) -> bool:
    return gpu.fp8 is not None and gpu not in [GPUS[name] for name in _WITHOUT_ROW_SCALES]


def _linear_layers(model: ModelFacts, experts: Experts | None) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the linear layers of a decoder layer with these experts."""
    hidden = model.hidden_size
    yield from attention_sizes(model).projections
    size = experts.shared_size if experts else model.intermediate_size
    yield from ((size, hidden), (size, hidden), (hidden, size))
