"""Decoder layers as units of ZeRO-3 and of the compiler.

DeepSpeed gathers and releases the weights of each module, in Python hooks. The compiler cannot trace these, so each module with
hooks would break the graph, and the compiler gives up after a few breaks. A layer that is compiled is therefore gathered as a
whole, as a leaf module of ZeRO-3: only the layer itself has hooks.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launcher.errors import ConfigError
from launcher.train.kernels.build_tools import missing_build_tools

# Maximum variants of a compiled layer: training and evaluation, shapes, and kinds of layers.
_MOST_VARIANTS = 64
_SETTING = "model.compile"


def find_layers(hf: Any, setting: str, remedy: str) -> list[nn.Module]:
    """Return the decoder layers of a model for a setting that needs them; `remedy` says how to do without.

    Raises:
        ConfigError: if the architecture's layers cannot be distinguished from its other modules.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) == hf.config.get_text_config().num_hidden_layers:
        return layers
    message = "the layers of this architecture cannot be distinguished from its other modules"
    raise ConfigError(message, where=setting, value=str(hf.config.model_type), remedy=remedy)


def compile_layers(hf: Any, device: torch.device) -> None:
    """Compile the forward pass, and with it the backward pass, of each decoder layer; attention stays a separate kernel.

    Call it before the engine is built. Compilation takes about a minute, in the first step and in the first evaluation.

    Raises:
        ConfigError: if the architecture's layers cannot be distinguished from its other modules, or this machine lacks the build
            tools that torch's compiler needs.
    """
    import torch._dynamo
    import torch._inductor.config
    from deepspeed.utils import set_z3_leaf_module
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers = find_layers(hf, _SETTING, f"set {_SETTING}=false")
    if problems := missing_build_tools(device.type):
        raise ConfigError(
            replace(one, message=f"{_SETTING}: {one.message}", where=_SETTING, remedy=f"{one.remedy}, or set {_SETTING}=false")
            for one in problems
        )
    # There are only a few graphs, so use no helper processes. This applies only to this thread; autograd's threads use the value
    # that torch's compiler read from the variable when launcher/train/preload.py imported it.
    torch._inductor.config.compile_threads = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"))
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    # Document boundaries are values that differ in each batch, so each batch would be compiled.
    kernel = hf.config._attn_implementation
    if kernel in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(kernel, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[kernel]))
    for layer in layers:
        set_z3_leaf_module(layer, True)
        layer.forward = torch.compile(layer.forward)
