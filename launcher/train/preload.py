"""Imports everything that a rank needs until its first step."""

from __future__ import annotations

import gc
import os
from contextlib import suppress

from launcher.plan.launch_plan import LaunchPlan


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
        import torch._dynamo  # noqa: F401  # see launcher.train.model.build_model

        import launcher.train.loop  # noqa: F401
        from launcher.train.engine import import_muon

        import_muon()
        # Only the ranks run remote code.
        if not plan.config.model.trust_remote_code:
            with suppress(Exception):
                from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

                config = (
                    AutoConfig.from_pretrained(plan.model.path, trust_remote_code=False)
                    if plan.model.path is not None
                    else AutoConfig.for_model(**plan.model.config)
                )
                MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if tracks and plan.config.tracking.kind == "wandb":
            with suppress(Exception):
                import wandb  # noqa: F401
    finally:
        # Later collections skip frozen objects; otherwise they would copy their pages in a forked process.
        gc.freeze()
        gc.enable()
