"""Bytes per token that compiled decoder layers save for the backward pass: measured on the CPU, and estimated by the plan.

    python benchmarks/compiled_memory.py [PRESET ...]

Layers have their real width. The compiler decides what a layer saves, and torch's saved-tensor hooks observe it. The difference
between three layers and one gives the bytes of two. Writes a table into RESULTS.md.
"""

from __future__ import annotations

from typing import Any

import sides
import torch
import torch._dynamo
import yaml
from torch import Tensor

from launcher.config.compose import conf_dir
from launcher.plan.architecture import model_facts
from launcher.plan.sizing.layers import Kernels, layer_activations
from launcher.train import attention
from launcher.train.model import compile_layers, find_decoder

PRESETS = ("llama3_2_1b", "qwen3_0_6b")
TOKENS, LAYERS = 512, (1, 3)


def main() -> None:
    parser = sides.parser(__doc__, rounds=None)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    args = parser.parse_args()
    lines = [
        "| preset | layers are | bytes a token and layer, measured | by the plan | plan / measured |",
        "|---|---|---|---|---|",
    ]
    for preset in args.presets:
        for is_compiled in (False, True):
            measured, planned = kept_bytes(preset, is_compiled)
            way = "compiled" if is_compiled else "eager"
            lines.append(f"| {preset} | {way} | {measured:,.0f} | {planned:,.0f} | {planned / measured:.3f} |")
            print(lines[-1], flush=True)
    source = "From layers that `launcher.train.model.compile_layers` compiled for the CPU, called from Python."
    sides.record(
        args.results,
        "memory of compiled layers",
        "memory of compiled layers",
        source,
        sides.typed("compiled_memory.py", *args.presets),
        lines,
    )


def kept_bytes(preset: str, is_compiled: bool) -> tuple[float, float]:
    """Return the bytes that a layer saves per token in bf16: measured, and estimated by the plan."""
    values = yaml.safe_load((conf_dir() / "model" / f"{preset}.yaml").read_text())["config"]
    values |= {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    few, many = (_saved_bytes(_build(values | {"num_hidden_layers": count}, is_compiled)) for count in LAYERS)
    kernels = Kernels(2, attention.VARLEN, TOKENS, compiled=is_compiled)
    facts = model_facts(values, None, None, None)
    # On CPUs, the attention outputs of a row's documents are also copied into one array.
    planned = layer_activations(facts, None, kernels).saved + 2 * facts.num_heads * facts.head_dim
    return (many - few) / (LAYERS[1] - LAYERS[0]) / TOKENS, planned


def _build(values: dict[str, Any], is_compiled: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register_varlen()
    options = {"dtype": torch.bfloat16, "attn_implementation": attention.VARLEN}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), **options)
    model.train()
    if is_compiled:
        compile_layers(model, torch.device("cpu"))
    return model


def _saved_bytes(model: Any) -> int:
    """Return the bytes of all distinct storages that a forward pass saves, except weights and buffers."""
    ids, offsets = torch.zeros(1, TOKENS, dtype=torch.long), torch.tensor([0, TOKENS], dtype=torch.int32)
    documents = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": TOKENS, "max_length_k": TOKENS}
    positions = torch.arange(TOKENS)[None]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    decoder = find_decoder(model)
    # The first call compiles and is not measured.
    decoder(input_ids=ids, position_ids=positions, use_cache=False, **documents)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = decoder(input_ids=ids, position_ids=positions, use_cache=False, **documents).last_hidden_state
    output.sum().backward()
    return sum(sizes.values())


if __name__ == "__main__":
    main()
