"""torch's build and the GPUs it sees: `python -m launcher.worker.doctor.torch_build` prints them as one JSON object.

This runs in a separate process because the import takes seconds and may crash, and the first CUDA call may hang.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict, dataclass

from launcher.worker.doctor.python_process import run_python

_DEADLINE_S = 180.0


@dataclass(frozen=True)
class TorchBuild:
    """torch's version, the CUDA it was built for (empty for none), the GPUs that it can use, and why it cannot use any."""

    version: str
    cuda: str
    num_gpus: int
    nccl: str
    problem: str


@functools.cache
def read_torch_build() -> TorchBuild | str:
    """Return how torch was built, or why it cannot be imported."""
    finished = run_python(["-m", __spec__.name], _DEADLINE_S)
    if finished.reason:
        return finished.reason
    return TorchBuild(**json.loads(finished.output.strip().splitlines()[-1]))


def _look() -> TorchBuild:
    import torch

    problem, num_gpus = "", 0
    if torch.version.cuda is not None:
        try:
            num_gpus = torch.cuda.device_count()
            for i in range(num_gpus):
                # The first kernel fails if torch has none for this GPU's compute capability.
                torch.ones(2, device=f"cuda:{i}").sum().item()
            if not num_gpus:
                # Says why.
                torch.cuda.init()
        # torch raises many types of exceptions here.
        except Exception as error:
            problem, num_gpus = str(error).strip().splitlines()[0], 0
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda is not None else ""
    return TorchBuild(torch.__version__, torch.version.cuda or "", num_gpus, nccl, problem)


if __name__ == "__main__":
    print(json.dumps(asdict(_look())))
    sys.exit(0)
