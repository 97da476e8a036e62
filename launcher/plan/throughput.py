"""Expected tokens per second, hours and cost of a run, as ranges, from the MFU of published runs. Pure.

Published MFU: the bf16 tables of scripts/train/benchmarking/README.md in mosaicml/llm-foundry (22 April 2024), with rows of 1,024
to 8,192 tokens, on 8 to 512 GPUs, FSDP with FlashAttention, for dense models of 125 million to 70 billion parameters. That page
counts attention over the whole square of a row. Here it is counted as in `train_flops`, over the causal half: (MFU* + MFU) / 2 of
the page's formulas. Its A100 nodes were connected with 1,600 Gbit/s.

ZERO3_SHARE lowers the low end: DeepSpeed ZeRO-3 with transformers reached an MFU of 0.40 with a model of 7 billion parameters on
four A100s (huggingface.co/blog/deepspeed-to-fsdp-and-back, June 2024), while the page's median for such a model is 0.57. It also
covers torchtitan's measurement without compilation: 0.33 with Llama 3.1 8B on eight H100s, where the page's lowest is 0.326
(benchmarks/llama3_h100_202412_torchtitan.md in pytorch/torchtitan).

Two effects lower the low end further. For each micro-batch, ZeRO-3 gathers all weights twice and reduces all gradients once
(Rajbhandari et al., arXiv:1910.02054, section 7), which a small micro-batch does not hide: below FULL_TOKENS the low end is
proportional to its tokens. Between nodes, this traffic takes its time at ASSUMED_GBITS, in addition to the computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.architecture import experts_of
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import GPUS, recognize
from launcher.plan.launch_plan import LaunchPlan

ZERO3_SHARE = 0.7
# From FULL_TOKENS per micro-batch, the published MFU is used as it is. Below MIN_TOKENS there is no estimate.
FULL_TOKENS, MIN_TOKENS = 4096, 1024
# Per node: one network adapter of 400 Gbit/s. Training nodes have up to eight; other nodes have 100 Gbit/s or less.
ASSUMED_GBITS = 400
_BYTES_PER_PARAM = 3 * 2
_SOURCE = "published for FSDP (LLM Foundry, 2024-04)"
# The largest model of each class in parameters: the geometric mean of neighboring sizes. Each GPU has the lowest and the highest
# MFU of each class, None if none is published.
_SIZES = (0.21e9, 0.52e9, 1.0e9, 1.9e9, 4.2e9, 9.3e9, 19.6e9, 44e9, 100e9)
_A100_40GB = (
    *((0.343, 0.382), (0.379, 0.457), (0.414, 0.512), (0.424, 0.550), (0.459, 0.564)),
    *((0.431, 0.503), (0.394, 0.510), (0.506, 0.511), (0.351, 0.479)),
)
_A100_80GB = (
    *((0.357, 0.403), (0.396, 0.474), (0.432, 0.521), (0.460, 0.580), (0.494, 0.609)),
    *((0.478, 0.618), (0.503, 0.585), (0.363, 0.552), (0.475, 0.522)),
)
_H100 = (
    *(None, None, (0.272, 0.380), (0.306, 0.404), (0.336, 0.448)),
    *((0.326, 0.447), (0.384, 0.436), (0.275, 0.429), (0.354, 0.425)),
)
# H200 and GH200 use the chip of the H100, with more memory.
_PUBLISHED: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "A100-40GB": _A100_40GB,
    "A100-80GB": _A100_80GB,
    "H100-80GB": _H100,
    "H200": _H100,
    "GH200": _H100,
}


@dataclass(frozen=True)
class SpeedEstimate:
    """The expected numbers of a run, each as (lowest, highest); None if unknown.

    `basis` is the source of the figures or, without figures, the reason.
    """

    basis: str
    mfu: tuple[float, float] | None = None
    tokens_per_sec: tuple[float, float] | None = None
    tokens_per_sec_per_gpu: tuple[float, float] | None = None
    hours: tuple[float, float] | None = None
    usd: tuple[float, float] | None = None


def peak_tflops(plan: LaunchPlan, gpu: str) -> float | None:
    """Return the peak of a GPU in the type that the run computes in, as for perf/mfu; None for an unknown GPU."""
    key, dtype = recognize(gpu), plan.config.model.dtype
    return None if key is None or dtype == "auto" else GPUS[key].peak_tflops(dtype)


def estimate_speed(plan: LaunchPlan, gpu: str) -> SpeedEstimate:
    """Estimate the training steps of a run on GPUs named `gpu`, without evaluation, checkpoints and start-up."""
    if plan.topology.device != "cuda":
        return SpeedEstimate("the run is planned for CPUs, for which no MFU is published")
    peak, flops, data = peak_tflops(plan, gpu), train_flops(plan.model), plan.data
    if peak is None:
        return SpeedEstimate(f"{gpu} is not in the table of GPU types; a type in cluster.gpu_type gives one")
    if flops is None:
        return SpeedEstimate(f"the launcher does not know the FLOPs of {plan.model.config.get('model_type')}")
    # In a document of mean length; without data, in a fully trained document that fills a row.
    if data is None or not data.num_docs or not data.num_tokens:
        length = plan.config.data.max_length
        flops_per_token = flops.of([length], length) / length
    else:
        length = max(1, round(data.num_tokens / data.num_docs))
        flops_per_token = flops.of([length], 0) / length + flops.per_label * data.num_trained_tokens / data.num_tokens
    tokens_per_step = plan.batch.expected_tokens
    micro_batch_tokens = tokens_per_step / (plan.batch.accumulation * plan.topology.data_ranks)
    if micro_batch_tokens < MIN_TOKENS:
        few = f"a micro-batch has {micro_batch_tokens:,.0f} tokens, and below {MIN_TOKENS:,} no MFU is published"
        return SpeedEstimate(f"{few}: raise train.micro_batch_size or data.max_length, or use fewer GPUs")
    published = _find_published_mfu(plan, gpu)
    if isinstance(published, str):
        return SpeedEstimate(published)
    low, high = ZERO3_SHARE * published[0], published[1]
    basis = f"{_SOURCE}, the low end scaled by {ZERO3_SHARE:g} for ZeRO-3"
    if micro_batch_tokens < FULL_TOKENS:
        share = micro_batch_tokens / FULL_TOKENS
        low *= share
        basis += f" and by {share:.2g} for micro-batches of {micro_batch_tokens:,.0f} tokens"
    if plan.topology.nodes > 1:
        # The traffic between nodes adds its whole time to each micro-batch.
        nodes = plan.topology.nodes
        num_bytes = _BYTES_PER_PARAM * plan.model.num_params * (nodes - 1) / nodes
        ideal_s = micro_batch_tokens * flops_per_token / (peak * 1e12)
        low = ideal_s / (ideal_s / low + num_bytes / (ASSUMED_GBITS * 1e9 / 8))
        basis += f"; the low end assumes {ASSUMED_GBITS} Gbit/s between nodes"
    if data is None:
        basis += "; assumes one document of data.max_length tokens per row, all trained"
    per_gpu = low * peak * 1e12 / flops_per_token, high * peak * 1e12 / flops_per_token
    world_size, hours = plan.topology.world_size, None
    per_second = per_gpu[0] * world_size, per_gpu[1] * world_size
    if plan.batch.max_steps is not None:
        seconds = [plan.batch.max_steps * tokens_per_step / rate for rate in per_second]
        hours = seconds[1] / 3600, seconds[0] / 3600
    price = None if plan.price is None else world_size * plan.price.usd_per_gpu_hour
    usd = None if hours is None or price is None else (hours[0] * price, hours[1] * price)
    return SpeedEstimate(basis, (low, high), per_second, per_gpu, hours, usd)


def _find_published_mfu(plan: LaunchPlan, gpu: str) -> tuple[float, float] | str:
    """Return the published MFU of this kind of run, or why there is none."""
    deepspeed, key = plan.config.deepspeed, recognize(gpu) or gpu
    if plan.config.model.dtype not in ("bf16", "fp16"):
        return f"no MFU is published for {plan.config.model.dtype}"
    if (deepspeed.offload_optimizer, deepspeed.offload_params) != ("none", "none"):
        return "with offloaded states the speed depends on the main memory and the buses of a node"
    if experts_of(plan.model.config):
        return "no MFU is published for mixtures of experts"
    classes = _PUBLISHED.get(key)
    if classes is None:
        return f"no MFU is published for {key}"
    by_size = (mfu for most, mfu in zip(_SIZES, classes, strict=True) if plan.model.num_params <= most)
    return next(by_size, None) or f"no MFU is published for a model of this size on {key}"
