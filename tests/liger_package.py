"""A package with the layout of liger-kernel 0.8 and the functions that the launcher uses, implemented in torch.

As in Liger, the package imports its kernel modules at once, and `monkey_patch` only when one of its names is used.
"""

from __future__ import annotations

from pathlib import Path

FILES = {
    "__init__": """
import importlib

from liger_kernel.transformers.rms_norm import LigerRMSNorm

def __getattr__(name):
    if name == "_apply_liger_kernel_to_instance":
        return getattr(importlib.import_module("liger_kernel.transformers.monkey_patch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
""",
    "rms_norm": """
from torch import nn, ones

class LigerRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=True):
        super().__init__()
        self.weight = nn.Parameter(ones(hidden_size))
        self.variance_epsilon, self.offset, self.casting_mode, self.in_place = eps, offset, casting_mode, in_place

    def forward(self, hidden_states):
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
""",
    # Patches classes and functions of the modeling module, and attributes and methods of the instance.
    "monkey_patch": """
from liger_kernel.transformers.rms_norm import LigerRMSNorm

def compute_on_a_gpu(*_, **__):
    raise RuntimeError("Triton is asked to compute on a CPU")

def _bind_method_to_module(module, method_name, new_method):
    module.__dict__[method_name] = new_method.__get__(module, module.__class__)

def _patch_rms_norm_module(module):
    module.casting_mode, module.in_place = "llama", True
    _bind_method_to_module(module, "forward", compute_on_a_gpu)
    _bind_method_to_module(module, "_get_name", lambda self: LigerRMSNorm.__name__)

def _apply_liger_kernel_to_instance(model, **kwargs):
    assert kwargs == {"fused_linear_cross_entropy": False, "cross_entropy": False}
    if model.config.model_type != "llama":
        return
    from transformers.models.llama import modeling_llama
    modeling_llama.apply_rotary_pos_emb = compute_on_a_gpu
    modeling_llama.LlamaRMSNorm = LigerRMSNorm
    _patch_rms_norm_module(model.model.norm)
    for decoder_layer in model.model.layers:
        _patch_rms_norm_module(decoder_layer.input_layernorm)
        _patch_rms_norm_module(decoder_layer.post_attention_layernorm)
""",
}
# The same, for a transformers version in which a layer has another name.
APPLIED_IN_PART = FILES["monkey_patch"].replace("decoder_layer.post_attention_layernorm", "decoder_layer.moved_layernorm")


def write_package(folder: Path, **files: str) -> Path:
    """Write the package, with `files` in place of these modules; returns the folder for sys.path."""
    package = folder / "liger_kernel/transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    for name, content in {**FILES, **files}.items():
        (package / f"{name}.py").write_text(content)
    return folder
