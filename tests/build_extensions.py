"""Compile DeepSpeed's C++ extensions for offloaded states into the user's cache, or into TORCH_EXTENSIONS_DIR if that is set.

    python tests/build_extensions.py

Takes minutes with an empty cache, and seconds afterwards. Processes that build the same extension wait for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

EXTENSIONS = ("CPUAdamBuilder", "AsyncIOBuilder")


def main() -> None:
    # PATH, and not CXX, which would be part of the commands: a later build with another compiler would compile all files again.
    os.environ["PATH"] = f"{Path(__file__).with_name('quick_compiler')}{os.pathsep}{os.environ['PATH']}"
    from launcher.train.engine import lock_builds

    lock_builds()
    from deepspeed.accelerator import get_accelerator

    for name in EXTENSIONS:
        get_accelerator().create_op_builder(name).load()


if __name__ == "__main__":
    main()
