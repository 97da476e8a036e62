"""What a rank imports until its first step, for a process that ranks are forked from."""

from __future__ import annotations

from contextlib import suppress

from launcher.plan.launch_plan import LaunchPlan


def import_stack(plan: LaunchPlan) -> None:
    """Import the training loop, DeepSpeed, the model's classes and W&B, as far as this plan needs them.

    Nothing is built and no device is touched. What cannot be imported is left to the rank, which says so in its own log.
    """
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401

    import launcher.train.loop  # noqa: F401
    from launcher.train.engine import import_muon

    import_muon()
    with suppress(Exception):
        _import_model_classes(plan)
    if plan.config.tracking.kind == "wandb":
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
