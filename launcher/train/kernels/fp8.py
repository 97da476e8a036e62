"""Linear layers of decoder layers in FP8, with torchao's casts and products: only in training, not in evaluation or export.

Weights stay bf16 parameters with their names, so ZeRO-3, optimizer, checkpoints and export are unaffected. Each row of an input
has its own scale (torchao's recipe `rowwise`). With one scale for a whole tensor, the largest value of a document would decide
how the documents packed beside it are rounded.

torchao's own layer does not work under ZeRO-3: its autograd function keeps a transposed view of the weight for the backward pass.
DeepSpeed releases a weight by giving the parameter other data, so that view would hold the gathered weights of all layers. The
function here keeps the parameter itself, whose data DeepSpeed gathers again before the backward pass, and calls torchao's
function.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import ConfigError
from launcher.plan.sizing.fp8 import MULTIPLE
from launcher.train.kernels.trial import run_on_each_rank

_WHERE, _WITHOUT = "model.fp8", "set model.fp8=false"
_CAPABILITY = (9, 0)
# Linear layers that choose experts: they are small, and a rounded score may choose another expert.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Sizes of the trial: rows that are not a multiple of 16 are padded. Rounding each factor to three bits changes a sum by 4%.
_TOKENS, _COLUMNS, _ROWS = 24, 64, 48
_MOST_ERROR = 0.1


class Fp8Linear(nn.Linear):
    """A linear layer that trains in FP8. Only the layer's class changes; its weight stays the same parameter."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply inputs [..., C] by the transposed weight [R, C] and add the bias: [..., R] in the type of the inputs."""
        if not self.training:
            return super().forward(inputs)
        tokens = inputs.numel() // self.in_features
        output: Tensor = _Product.apply(inputs, self.weight, bool(tokens % MULTIPLE))
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """torchao's `matmul_with_hp_or_float8_args` of inputs and a transposed weight, but keeping the weight itself.

    `pads` is whether to pad the tokens, the inner dimension of the product for the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, pads: bool) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.pads = pads
        nothing_saved = SimpleNamespace(save_for_backward=lambda *_: None)
        output: Tensor = _product().forward(nothing_saved, inputs, weight.t(), *_settings(inputs.device.type, pads))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, weight = ctx.saved_tensors
        products, config = _settings(inputs.device.type, ctx.pads)
        saved = SimpleNamespace(saved_tensors=(inputs, weight.t()), linear_mm_config=products, config=config)
        of_inputs, of_transposed_weight, *_ = _product().backward(saved, *gradients)
        return of_inputs, of_transposed_weight.t(), None


def require_usable(device: torch.device) -> None:
    """Compute a product in FP8 on each rank. Collective.

    Raises:
        ConfigError: on all ranks, if any rank cannot.
    """
    remedy = f"pip install 'launcher[fp8]' on every node, with Hopper or Blackwell GPUs; or {_WITHOUT}"
    reason, remedy = run_on_each_rank(lambda: try_product(device), lambda: remedy, device)
    if reason:
        raise ConfigError("linear layers cannot be computed in FP8", where=_WHERE, value=reason, remedy=remedy)


def try_product(device: torch.device) -> None:
    """Compute a small linear layer and its gradients in FP8, and compare them with bf16.

    Raises:
        Exception: whatever torchao, torch or the GPU's driver raises.
    """
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        needed, present = (".".join(map(str, version)) for version in (_CAPABILITY, capability))
        raise RuntimeError(f"FP8 needs a GPU of compute capability {needed}, and this one has {present}")
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    # Keep the random state, because the initial weights of a model follow from the seed.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        inputs = torch.randn(_TOKENS, _COLUMNS, **options, requires_grad=True)
        weight = torch.randn(_ROWS, _COLUMNS, **options, requires_grad=True)
        gradient = torch.randn(_TOKENS, _ROWS, **options)
    expected = (inputs @ weight.t(), gradient @ weight, gradient.t() @ inputs)
    with torch.enable_grad():
        output = _Product.apply(inputs, weight, bool(_TOKENS % MULTIPLE))
        computed = (output, *torch.autograd.grad(output, (inputs, weight), gradient))
    for one, other in zip(computed, expected, strict=True):
        # Reading the result waits for the GPU, which reports a failed kernel only then.
        error = float((one.detach() - other.detach()).float().norm() / other.detach().float().norm())
        if not error < _MOST_ERROR:
            raise ArithmeticError(f"products in FP8 differ from those in bf16 by {error:.0%}")


def convert(hf: Any, decoder_layers: Sequence[nn.Module], compiles: bool) -> str:
    """Make the linear layers of decoder layers compute in FP8; return which ones do. Call it before the engine is built.

    These stay unchanged: layers whose sizes FP8 does not support, routers, the head, embeddings, and experts that are not
    linear layers.

    Raises:
        ConfigError: if no layer can be converted.
    """
    linears = [
        (name, module)
        for layer in decoder_layers
        for name, module in layer.named_modules()
        # A subclass may compute something else.
        if type(module) is nn.Linear and name.rpartition(".")[2] not in _ROUTERS
    ]
    # Under ZeRO-3 a partitioned weight has no shape.
    fitting = [one for _, one in linears if one.in_features % MULTIPLE == 0 and one.out_features % MULTIPLE == 0]
    left_out = Counter(f"{name} ({one.out_features} x {one.in_features})" for name, one in linears if one not in set(fitting))
    because = f"sizes that are not multiples of {MULTIPLE}: {', '.join(left_out)}" if left_out else "there are none"
    if not fitting:
        raise ConfigError(
            "this model has no linear layers that can be computed in FP8", where=_WHERE, value=because, remedy=_WITHOUT
        )
    torch._dynamo.allow_in_graph(_Product)
    if compiles:
        _avoid_compiler_fault()
    for linear in fitting:
        linear.__class__ = Fp8Linear
    use = f"{len(fitting)} of {len(linears)} linear layers of decoder layers are computed in FP8 while training"
    return f"{use}; {left_out.total()} are not, with {because}" if left_out else use


def _avoid_compiler_fault() -> None:
    """Let torchao change how torch's compiler writes minima, which Triton may turn into wrong FP8 values (triton issue 11111)."""
    from torchao.float8 import convert_to_float8_training

    # torchao makes this change no matter what it converts.
    convert_to_float8_training(nn.Module(), module_filter_fn=lambda *_: False)


def _product() -> Any:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    return matmul_with_hp_or_float8_args


@functools.cache
def _settings(device_type: str, pads: bool) -> tuple[Any, Any]:
    """Return torchao's settings for the three products and for the casts. On CPUs, where only tests run, it emulates them."""
    from torchao.float8 import Float8LinearConfig, LinearMMConfig, ScaledMMConfig

    config, emulates = Float8LinearConfig.from_recipe_name("rowwise"), device_type != "cuda"
    products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    output, of_inputs, of_weight = (ScaledMMConfig(emulates, product.use_fast_accum) for product in products)
    # Its inner dimension is the tokens; the inner dimensions of the other products are sizes of the weight.
    return LinearMMConfig(output, of_inputs, of_weight._replace(pad_inner_dim=pads)), config
