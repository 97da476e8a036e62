"""The bare loop in Ray Train, written as in Ray's documentation: the baseline for startup on Ray.

    python benchmarks/ray_trainer.py --workers 2 --model DIR --rows ROWS.npz --deepspeed DS.json

Takes the same options as bare_loop.py and prints the same output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

HERE = Path(__file__).resolve().parent


def loop(config: dict[str, Any]) -> None:
    sys.path.insert(0, str(HERE))
    import bare_loop

    found = bare_loop.train(bare_loop.arguments(config["options"]))
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["out"]).write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True)
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="launcher-bench-ray-") as folder:
        out = Path(folder) / "times.json"
        TorchTrainer(
            loop,
            train_loop_config={"options": options, "out": str(out)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=args.workers),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        print(out.read_text(), flush=True)


if __name__ == "__main__":
    main()
