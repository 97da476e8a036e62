"""Tries optional kernels: each rank computes with them before the weights load, and all ranks learn where they fail.

Package metadata does not tell whether a kernel works: a build for another torch fails on import, and a kernel fails on a GPU that
it was not built for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from launcher.distributed import gather_json
from launcher.errors import describe

_MOST_CHARACTERS = 300


def run_on_each_rank(action: Callable[[], None], remedy: Callable[[], str], device: torch.device) -> tuple[str, str]:
    """Run an action on each rank; return the error of the first rank where it failed, and the remedy there. Collective.

    All ranks return the same texts, empty if it failed on none. Without a process group, this process is the only rank.
    """
    reason = mended_by = ""
    try:
        action()
    # A build for another torch, transformers or Triton may raise any exception.
    except Exception as error:
        reason, mended_by = _first_line(error), remedy()
    if not dist.is_initialized():
        return reason, mended_by
    failed = torch.tensor(int(bool(reason)), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return "", ""
    answers = enumerate(gather_json([reason, mended_by]))
    rank, (reason, mended_by) = next((rank, answer) for rank, answer in answers if answer[0])
    return f"rank {rank}: {reason}", mended_by


def _first_line(error: Exception) -> str:
    lines = describe(error).strip().splitlines()
    return lines[0][:_MOST_CHARACTERS]
