"""The processes of one node of an evaluation in a Slurm allocation: `srun python -m launcher.worker.slurm.evaluation_node`."""

from __future__ import annotations

import os
import sys

from launcher.child_process import exit_on_termination
from launcher.evaluate.node import run_node

if __name__ == "__main__":
    exit_on_termination()
    node, num_nodes = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    sys.exit(run_node(sys.argv[1], node, num_nodes, int(sys.argv[2])))
