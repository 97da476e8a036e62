"""Small models with random weights on disk, intact or broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# The end of the names of router corrections, which are not trained: buffers of DeepSeek-V3, frozen parameters of ERNIE 4.5.
ROUTER_BUFFER = "e_score_correction_bias"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "olmoe": {"num_experts": 12, "num_experts_per_tok": 2},  # two digits
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8},
    },
    # Its buffers have other names in the files.
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
        **{"moe_intermediate_size": 8, "moe_layer_start_index": 1},
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def save_model(folder: Path, config: Mapping[str, Any], **saving: Any) -> Path:
    """Save a random model of this architecture with tiny sizes."""
    sizes = {**SIZES, **EXPERTS.get(config["model_type"], {}), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**{**config, **sizes}))
    hf.save_pretrained(folder, **saving)
    return folder


def change_weights(folder: Path, change: Callable[[Tensors], object], name: str = "model.safetensors") -> Path:
    """Rewrite a weight file after `change` of its tensors."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]
