"""Compile DeepSpeed's C++ extensions for offloaded states into the user's cache, or into TORCH_EXTENSIONS_DIR if that is set.

    python tests/build_extensions.py

Takes minutes with an empty cache, and seconds afterwards. Processes that build the same extension wait for each other.
"""

from __future__ import annotations

EXTENSIONS = ("CPUAdamBuilder", "AsyncIOBuilder")


def main() -> None:
    from launcher.train.engine import lock_builds

    lock_builds()
    from deepspeed.accelerator import get_accelerator

    for name in EXTENSIONS:
        get_accelerator().create_op_builder(name).load()


if __name__ == "__main__":
    main()
