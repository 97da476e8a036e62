"""The raw DeepSpeed keys that `deepspeed.extra` may contain. Pure.

They tune communication or report; none changes what is trained, or a number that the plan computes. DeepSpeed judges their values
(launcher/worker/checks/deepspeed_check.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from launcher.config.error_messages import shown
from launcher.config.introspect import leaves
from launcher.config.origin import Origins
from launcher.errors import Problem

EXTRA = "deepspeed.extra"
# A name stands for the key with everything below it.
_ALLOWED = (
    *("communication_data_type", "comms_logger", "csv_monitor", "disable_allgather", "dump_state", "flops_profiler"),
    *("memory_breakdown", "tensorboard", "wall_clock_breakdown"),
    *(f"aio.{name}" for name in ("block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit")),
    *(f"fp16.{name}" for name in ("hysteresis", "consecutive_hysteresis", "initial_scale_power", "loss_scale")),
    *(f"fp16.{name}" for name in ("loss_scale_window", "min_loss_scale")),
    *(f"zero_optimization.{name}" for name in ("contiguous_gradients", "ignore_unused_parameters", "leaf_module")),
    *(f"zero_optimization.{name}" for name in ("memory_efficient_linear", "overlap_comm", "reduce_scatter")),
    *(f"zero_optimization.{name}" for name in ("reduce_bucket_size", "round_robin_gradients", "sub_group_size")),
    *(f"zero_optimization.stage3_{name}" for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")),
    *(f"zero_optimization.stage3_{name}" for name in ("module_granularity_threshold", "param_persistence_threshold")),
    *("zero_optimization.stage3_use_all_reduce_for_fetch_params", "zero_optimization.use_multi_rank_bucket_allreduce"),
    *(f"zero_optimization.offload_optimizer.{name}" for name in ("buffer_count", "fast_init", "pin_memory")),
    *(f"zero_optimization.offload_param.{name}" for name in ("buffer_count", "pin_memory")),
)
_QGZ, _WRONG_SUMS = (
    "zero_optimization.zero_quantized_gradients",
    "DeepSpeed 0.19.8 sums quantized gradients (qgZ) wrongly: it divides by the number of nodes instead of ranks, and reads bf16 "
    "as fp16, so that a run trains on wrong gradients without an error",
)


def extra_problems(values: Mapping[str, Any], origins: Origins, skip: Set[str] = frozenset()) -> Iterator[Problem]:
    """Yield a problem for each key of `deepspeed.extra` in unvalidated settings that is not allowed, unless `skip` has it."""
    section = values.get("deepspeed")
    extra = section.get("extra") if isinstance(section, dict) else None
    for name, value in leaves(extra) if isinstance(extra, dict) else ():
        key = f"{EXTRA}.{name}"
        if key not in skip and not re.match(rf"({'|'.join(_ALLOWED)})($|[.\[])", name):
            close = difflib.get_close_matches(name, _ALLOWED, n=1, cutoff=0.9)
            remedy = f"did you mean {close[0]}?" if close else f"remove it; these are accepted: {', '.join(_ALLOWED)}"
            message = f"{key}: not accepted, because the plan or another setting decides it, or DeepSpeed has no such key"
            if name == _QGZ:
                message = f"{key}: {_WRONG_SUMS}"
            yield Problem(message, origins.of(key), shown(key, value), remedy)
