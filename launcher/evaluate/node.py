"""Runs one node's processes: `python -m launcher.evaluate.node FOLDER NODE NUM_NODES GPUS`.

GPUS is the number of GPUs per node; each process gets evaluate.vllm_gpus of them. 0 means one process on the CPU. If one process
fails, the others are ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launcher.child_process import await_processes, run_process
from launcher.errors import EXIT_FAILED
from launcher.evaluate.evaluation_folder import EvaluationFolder
from launcher.security.folders import private_variables


def run_node(folder: str, node: int, num_nodes: int, num_gpus: int) -> int:
    """Run this node's processes to their end; returns the exit code of the first failed process, or 0."""
    gpus_per_process = EvaluationFolder(Path(folder)).read_task().settings.evaluate.vllm_gpus
    groups = divide_gpus(num_gpus, gpus_per_process, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if not groups:
        print(f"evaluate.vllm_gpus is {gpus_per_process}, and a node has {num_gpus} GPUs; lower it", flush=True)
        return EXIT_FAILED
    num_local = len(groups)
    processes = []
    for local, group in enumerate(groups):
        environ = {**os.environ, **private_variables(os.environ)}
        if num_gpus > 1:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(group)
        words = [folder, str(node * num_local + local), str(num_nodes * num_local), str(len(group))]
        command = [sys.executable, "-u", "-m", "launcher.evaluate.answers", *words]
        processes.append(subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL))
    failed = next(filter(None, await_processes(processes)), 0)
    return failed if failed >= 0 else 128 - failed


def divide_gpus(num_gpus: int, gpus_per_process: int, visible: str) -> list[list[str]]:
    """Return the GPUs of each process; on the CPU, one process without GPUs. `visible` is CUDA_VISIBLE_DEVICES."""
    if num_gpus == 0:
        return [[]]
    chosen = [one for one in visible.split(",") if one]
    names = [chosen[i] if i < len(chosen) else str(i) for i in range(num_gpus)]
    starts = range(0, num_gpus - gpus_per_process + 1, gpus_per_process)
    return [names[start : start + gpus_per_process] for start in starts]


if __name__ == "__main__":
    run_process(lambda argv: run_node(argv[0], *map(int, argv[1:4])))
