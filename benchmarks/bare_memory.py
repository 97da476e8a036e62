"""A forward and backward pass of a model at real size without weights, with fake tensors on the CPU.

benchmarks/memory_plan.py compares its activations with the plan's, and tests/plan/test_step_time.py its bytes moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.plan.architecture import model_facts
from launcher.plan.sizing.layers import Kernels, checkpointed_layers
from launcher.plan.sizing.memory import Pass, activation_bytes, head_elements, loss_bytes
from launcher.train.model import DTYPES, checkpoint_layers, find_decoder, replace_head

Watch = TypeVar("Watch", bound=TorchDispatchMode)
# Registered separately, because on CPUs the launcher's varlen computes documents one by one.
_NAME = "varlen_of_fake_tensors"


def _varlen(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any) -> tuple[Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim < head_dim:
        value = torch.nn.functional.pad(value, [0, head_dim - value_dim])
    query, key, value = (one.transpose(1, 2).squeeze(0) for one in (query, key, value))
    offsets, longest = given["cu_seq_lens_q"], given["max_length_q"]
    grouped = query.shape[1] != key.shape[1]
    output = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return output.unsqueeze(0)[..., :value_dim], None


def measure(
    config: dict[str, Any], tokens: int, checkpointing: str, dtype: str, chunk_tokens: int, attention: str = "varlen"
) -> int:
    """Return the peak bytes of a forward and backward pass over `tokens` trained tokens, excluding weights and gradients."""

    def watch(model: nn.Module) -> LiveBytes:
        return LiveBytes((*model.parameters(), *model.buffers()))

    return run_pass(config, tokens, checkpointing, dtype, chunk_tokens, watch, attention).peak


def run_pass(
    config: dict[str, Any],
    tokens: int,
    checkpointing: str,
    dtype: str,
    chunk_tokens: int,
    watch: Callable[[nn.Module], Watch],
    attention: str = "varlen",
) -> Watch:
    """Run one forward and backward pass over `tokens` trained tokens in the context that `watch` returns; return that context.

    Each weight's hook drops its gradient. Attention is torch's varlen_attn, which saves the same tensors as FlashAttention, or
    another kernel of transformers.
    The model is called as CausalLMLoss calls it, without the selection of trained tokens, which fake tensors do not allow.
    """
    import torch._dynamo
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register(_NAME, _varlen)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        options = {"dtype": DTYPES[dtype], "attn_implementation": _NAME if attention == "varlen" else attention}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **options)
        replace_head(model, chunk_tokens)
        checkpoint_layers(model, checkpointing)
        model.train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        ids, trained = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
        offsets = torch.zeros(5, dtype=torch.int32)
        documents = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": tokens, "max_length_k": tokens}
        watching = watch(model)
        with watching:
            decoder = find_decoder(model)
            hidden = decoder(input_ids=ids, position_ids=ids, use_cache=False, **documents).last_hidden_state
            selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, trained)
            del hidden
            loss = model.get_output_embeddings()(selected, trained, 1.0)
            del selected
            loss.backward()
        return watching


def predict(
    config: dict[str, Any], tokens: int, checkpointing: str, dtype: str, chunk_tokens: int, attention: str = "varlen"
) -> int:
    """Return the plan's estimate of what `measure` returns."""
    model, width = model_facts(config, None, None, None), DTYPES[dtype].itemsize
    kernels = Kernels(width, attention, tokens, packed=attention == "varlen")
    one_pass = Pass(tokens, kernels, checkpointed_layers(checkpointing, model.num_layers), chunk_tokens)
    activations = activation_bytes(model, one_pass)
    tied = width * head_elements(model) if model.tie_word_embeddings else 0
    in_loss, in_head = loss_bytes(model, one_pass), width * (head_elements(model) + tokens * model.hidden_size)
    in_layers = max(activations.final_norm, activations.backward)
    return max(activations.saved + in_loss, activations.saved + in_head, in_layers + tied)
