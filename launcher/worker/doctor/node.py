"""The checks of one machine for `launcher doctor`: `python -m launcher.worker.doctor.node [NAME] < CONFIG.json`.

Prints a report (launcher.clusters.check_results) and exits. A check that hangs is abandoned at its deadline and named.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.clusters.check_results import CheckResult, MachineReport, failure, to_lines
from launcher.clusters.network import node_name
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, describe
from launcher.worker.doctor import all_reduce, gpus, machine, storage, toolchain
from launcher.worker.doctor.python_process import kill_all
from launcher.worker.ranks.rank_env import die_with_parent

Check = Callable[[RunConfig], Iterator[CheckResult]]

_SHORT_S, _LONG_S = 60.0, 240.0
# The displayed name, the check, and its deadline in seconds. To add a check, add a function here or in this folder, and a row.
CHECKS: dict[str, tuple[Check, float]] = {
    "machine": (machine.check_machine, _SHORT_S),
    "limits": (machine.check_limits, _SHORT_S),
    "packages": (machine.check_packages, _SHORT_S),
    "GPUs": (gpus.check_gpus, 2 * _SHORT_S),
    "GPU memory": (gpus.check_gpu_memory, _SHORT_S),
    "torch": (gpus.check_torch, _LONG_S),
    "compiler": (toolchain.check_compiler, _LONG_S),
    "flash-attn": (toolchain.check_flash_attention, _LONG_S),
    "Liger": (toolchain.check_liger, _LONG_S),
    "all-reduce": (all_reduce.check_all_reduce, _LONG_S),
    "/dev/shm": (  # noqa: S108
        storage.check_shared_memory,
        _SHORT_S,
    ),
    "run.root": (storage.check_run_storage, _LONG_S),
    "caches": (storage.check_caches, _SHORT_S),
}


def run_check(name: str, check: Check, config: RunConfig, deadline_s: float) -> list[CheckResult]:
    """Return the results of one check under its name; a failure if it raises or misses the deadline."""
    results: list[CheckResult] = []

    def collect() -> None:
        try:
            results.extend(replace(result, name=name) for result in check(config))
        # A broken machine may make a check raise anything; the other checks must still report.
        except Exception as error:
            results.append(
                replace(failure(f"the check failed: {describe(error)}", "look at this part of the machine"), name=name)
            )

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not thread.is_alive():
        return results
    seen = f"no answer within {deadline_s:.0f} s: a device, a driver or a mount may hang"
    return [*results, replace(failure(seen, "look at dmesg, nvidia-smi and df on this machine"), name=name)]


def report(config: RunConfig, name: str) -> MachineReport:
    """Run all checks one after the other; in parallel they would disturb each other's measurements."""
    results = [result for title, (check, deadline_s) in CHECKS.items() for result in run_check(title, check, config, deadline_s)]
    return MachineReport(name, tuple(results), time.time())


def main(name: str) -> None:
    """Print this machine's report, under the scheduler's name for it."""
    signal.signal(signal.SIGTERM, _end)
    # The parent is the command, or the Ray worker, that requested the report.
    die_with_parent(signal.SIGTERM)
    config = RunConfig.model_validate_json(sys.stdin.read())
    print("\n".join(to_lines(report(config, name))), flush=True)


def _end(*_: object) -> None:
    """End without a report; files that a check created are removed at exit."""
    kill_all()
    sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else node_name())
    # A check that hangs in the kernel must not keep the process alive.
    os._exit(0)
