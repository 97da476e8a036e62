"""What a rank imports until its first step, all at once."""

from __future__ import annotations

import gc
from contextlib import suppress

from launcher.plan.launch_plan import LaunchPlan


def import_stack(plan: LaunchPlan, tracks: bool) -> None:
    """Import the training loop, DeepSpeed, the model's classes and, for the rank that `tracks`, W&B, as this plan needs them.

    Nothing is built and no device is touched. Model classes and W&B that cannot be imported are left to those who use them.
    """
    # Thousands of modules make many objects and no garbage: looking for some would take a fifth of the time.
    gc.disable()
    try:
        _import(plan, tracks)
    finally:
        # What lives for good is left out of every later collection, which in a forked process would copy its pages.
        gc.freeze()
        gc.enable()


def _import(plan: LaunchPlan, tracks: bool) -> None:
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401

    import launcher.train.loop  # noqa: F401
    from launcher.train.engine import import_muon

    import_muon()
    with suppress(Exception):
        _import_model_classes(plan)
    if tracks and plan.config.tracking.kind == "wandb":
        with suppress(Exception):
            import wandb  # noqa: F401


def _import_model_classes(plan: LaunchPlan) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = plan.model
    if plan.config.model.trust_remote_code:
        # Code that comes with a model is run by the ranks alone.
        return
    config = AutoConfig.from_pretrained(model.path) if model.path is not None else AutoConfig.for_model(**model.config)
    AutoModelForCausalLM._model_mapping.get(type(config), None)
