"""Test one attention kernel alone: import, isolation of packed documents, accuracy and speed.

    python benchmarks/gpu_kernel.py varlen [--tokens 16384] [--heads 16] [--kv-heads 8] [--head-dim 128]

Prints one JSON object. A missing kernel is not a failure: the object says what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

# For each kernel, the module whose import shows that it is installed, and its package.
FLASH = {
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_2": ("flash_attn", "flash-attn"),
}
KERNELS = (*FLASH, "varlen", "sdpa")
_REPEATS = 10
# Document lengths as shares of a row, unequal as in packed data.
_SHARES = (0.02, 0.06, 0.12, 0.25, 0.55)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of all documents together")
    parser.add_argument("--row-tokens", type=int, default=4096, help="tokens of a packed row")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    print(json.dumps(missing(args.kernel) or measure(args)), flush=True)


def missing(kernel: str) -> dict[str, Any]:
    """Return what this machine lacks for a kernel; empty if it can be imported."""
    if kernel == "varlen":
        import torch

        from launcher.train.attention import _varlen_parameters

        lacks = torch.cuda.is_available() and not {"scale", "window_size"} <= _varlen_parameters()
        return {"missing": f"torch {torch.__version__} lacks it"} if lacks else {}
    if kernel not in FLASH:
        return {}
    module, package = FLASH[kernel]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return {"missing": f"{package} is not installed"}
    try:
        importlib.import_module(module)
    # A build for another torch version fails with an OSError or an undefined symbol.
    except Exception as error:
        return {"missing": f"{package} cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"}
    return {}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the isolation of packed documents, the error relative to fp32, and the kernel's times."""
    import torch

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = _lengths(args.tokens, args.row_tokens)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    module, attend = _attention(args, device)
    # SDPA needs a mask per row to separate documents; the others get all rows as one.
    rows = args.tokens // args.row_tokens if args.kernel == "sdpa" else 1
    mask = _mask(_lengths(args.row_tokens, args.row_tokens), device) if args.kernel == "sdpa" else None
    shapes = [(rows, heads, args.tokens // rows, args.head_dim) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    tensors = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    given = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": max(lengths), "max_length_k": max(lengths)}

    def forward() -> torch.Tensor:
        output: torch.Tensor = attend(module, query, key, value, mask, dropout=0.0, scaling=args.head_dim**-0.5, **given)[0]
        return output

    gradient = torch.randn_like(forward())

    def both() -> None:
        forward().backward(gradient)
        query.grad = key.grad = value.grad = None

    in_one_row = (tensor.detach().transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value))
    error = _error(forward().detach().flatten(0, 1)[None], *in_one_row, offsets.tolist())
    forward_ms = _elapsed_ms(lambda: forward().detach(), device)
    total_ms = _elapsed_ms(both, device)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    # Scores and values: 2 products forward and 4 backward, each with 2 FLOPs per pair and element.
    flops = 12 * pairs * args.heads * args.head_dim
    return {
        **_isolation(args.kernel, device, dtype),
        "error": error,
        "forward_ms": forward_ms,
        "backward_ms": total_ms - forward_ms,
        "tflops": flops / total_ms / 1e9,
    }


def _lengths(tokens: int, row_tokens: int) -> list[int]:
    """Return the document lengths of all rows."""
    row = [max(1, int(share * row_tokens)) for share in _SHARES[:-1]]
    row.append(row_tokens - sum(row))
    return row * (tokens // row_tokens)


def _attention(args: argparse.Namespace, device: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the kernel as transformers calls it, and the layer from which it reads settings."""
    import torch
    from transformers import AutoConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from launcher.train import attention

    if args.kernel == attention.VARLEN:
        attention.register_varlen()
    module = torch.nn.Module()
    module.config = AutoConfig.for_model("llama")
    module.config._attn_implementation = args.kernel
    module.is_causal, module.layer_idx, module.num_key_value_groups = True, 0, args.heads // args.kv_heads
    return module, ALL_ATTENTION_FUNCTIONS[args.kernel]


def _mask(lengths: list[int], device: Any) -> Any:
    """Return the mask of token pairs that attend to each other, [1, 1, T, T]."""
    import torch

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return (document[:, None] == document).tril()[None, None]


def _error(output: Any, query: Any, key: Any, value: Any, offsets: list[int]) -> float:
    """Return the relative error of `output` [1, T, H, D] compared with fp32 attention, document by document."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    squared, of_all = 0.0, 0.0
    with torch.no_grad():
        for start, stop in pairwise(offsets):
            q, k, v = (tensor[:, :, start:stop].float() for tensor in (query, key, value))
            expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            squared += float((output[:, start:stop].float() - expected).square().sum())
            of_all += float(expected.square().sum())
    return float((squared / of_all) ** 0.5)


def _elapsed_ms(call: Callable[[], Any], device: Any) -> float:
    """Return the mean milliseconds per call over several calls, after an uncounted one."""
    import torch

    call()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(_REPEATS):
            call()
        return (time.perf_counter() - began) / _REPEATS * 1000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(_REPEATS):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / _REPEATS


def _isolation(kernel: str, device: Any, dtype: Any) -> dict[str, Any]:
    """Return whether packed documents of a small model affect each other with this kernel, by the launcher's own check."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.train.isolation import DOCUMENT_TOKENS, measure_isolation
    from launcher.train.model import CausalLMLoss

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, head_dim=64, vocab_size=512)
    model = CausalLMLoss(
        AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel).to(device).eval(),
        flatten=kernel != "sdpa",
    )
    boundaries = torch.arange(0, 3 * DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS, dtype=torch.int32)
    outcome, detail = measure_isolation(
        lambda ids, positions: model(ids, positions, cu_seqlens=boundaries), config.vocab_size, device
    )
    return {"is_isolated": outcome == "isolated", "isolation": detail}


if __name__ == "__main__":
    main()
