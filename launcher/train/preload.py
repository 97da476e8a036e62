"""Imports everything that a rank needs until its first step."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launcher.plan.launch_plan import LaunchPlan

# Optional packages that transformers imports with any language model, but uses only for object detection and assisted generation.
_UNUSED_PACKAGES = ("scipy", "sklearn")


def import_stack(plan: LaunchPlan, tracks: bool) -> None:
    """Import the training loop, DeepSpeed, the model's classes and, on the rank that `tracks`, W&B, as the plan requires.

    Builds nothing and touches no device. Failed imports of model classes or W&B are left to the code that uses them.
    """
    # Importing thousands of modules creates many objects but no garbage; collection would take a fifth of the time.
    gc.disable()
    # torch's compiler reads this once, when it is imported. Its helper processes would outlive a killed rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        import deepspeed  # noqa: F401
        import torch._dynamo  # noqa: F401

        import launcher.train.loop  # noqa: F401
        from launcher.train.engine import import_muon

        import_muon()
        # Only the ranks run remote code.
        if not plan.config.model.trust_remote_code:
            with suppress(Exception), _hide_unused_packages():
                from transformers import AutoConfig, AutoModelForCausalLM

                config = (
                    AutoConfig.from_pretrained(plan.model.path, trust_remote_code=False)
                    if plan.model.path is not None
                    else AutoConfig.for_model(**plan.model.config)
                )
                AutoModelForCausalLM._model_mapping.get(type(config), None)
        if tracks and plan.config.tracking.kind == "wandb":
            with suppress(Exception):
                import wandb  # noqa: F401
    finally:
        # Later collections skip frozen objects; otherwise they would copy their pages in a forked process.
        gc.freeze()
        gc.enable()


@contextmanager
def _hide_unused_packages() -> Iterator[None]:
    """Make transformers treat packages that no rank uses as absent: importing them takes 0.4 of 5 seconds."""
    utils = importlib.import_module("transformers.utils")
    names = [f"is_{package}_available" for package in _UNUSED_PACKAGES]
    checks = {name: getattr(utils, name) for name in names if hasattr(utils, name)}
    try:
        for name in checks:
            setattr(utils, name, lambda: False)
        yield
    finally:
        for name, check in checks.items():
            setattr(utils, name, check)
