"""The model that is trained: its kernels, its activation checkpointing, its compiled layers, and a head that returns the loss.

DeepSpeed gathers and releases the weights of each module, in Python hooks. The compiler cannot trace these, so each module with
hooks would break the graph, and the compiler gives up after a few breaks. A layer that is compiled is therefore gathered as a
whole, as a leaf module of ZeRO-3: only the layer itself has hooks.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launcher.checkpoint.initial_weights import stored_buffers
from launcher.config.sections.model import ModelSection
from launcher.data.loader import IGNORED, find_boundaries
from launcher.distributed import copy_to_device
from launcher.errors import ConfigError
from launcher.hardware import missing_build_tools
from launcher.models.remote_code import code_option, folder_to_load, without_code
from launcher.plan.launch_plan import LaunchPlan, ModelFacts
from launcher.plan.sizing.layers import NONE, checkpointed_layers, checkpointing_interval
from launcher.runs import atomic_files
from launcher.tracking.progress import MakeProgress, ignore_progress
from launcher.train import attention, liger
from launcher.train.loading import build_with_weights
from launcher.train.loss import LossHead

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class CausalLMLoss(nn.Module):
    """A Hugging Face model with a forward pass that returns the loss over trained labels."""

    def __init__(self, model: nn.Module, flatten: bool, liger_problem: str = "") -> None:
        super().__init__()
        self.hf = model
        # Why Liger is not used although the plan assumes it.
        self.liger_problem = liger_problem
        # FlashAttention and varlen keep documents apart only in a batch of one row.
        self.flatten = flatten
        # In a tuple, so that torch does not register the module twice.
        self._decoder = (find_decoder(model),)
        # Remote code may lack the keyword arguments of transformers' models.
        parameters = inspect.signature(self._decoder[0].forward).parameters.values()
        self._takes_cu_seqlens = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        factor: float | Tensor = 1.0,
        cu_seqlens: Tensor | None = None,
        by_model: bool = False,
        per_token: bool = False,
        by_document: bool = False,
    ) -> Tensor:
        """Return the summed negative log-likelihood over `labels` [B, T], without IGNORED: an fp32 scalar.

        `factor` multiplies the loss of all labels, or is fp32 [B, T] on the device of `labels`, one factor per label.
        With `per_token`, return the negative log-likelihood of each label instead, fp32 [N], without a gradient. Without
        labels, return logits [B, T, V] ([1, B * T, V] if `flatten`). All passes use this method, because ZeRO-3 gathers
        weights around it. `cu_seqlens`, from a MicroBatch, saves the pass from searching `position_ids` for document
        boundaries. With `by_model`, return the logits that the whole Hugging Face model computes from the ids alone. With
        `by_document`, each row is one document; return the loss of each label, fp32 [N], with a gradient and by torch's own
        cross entropy.
        """
        if by_model:
            return self.hf(input_ids=input_ids, use_cache=False).logits
        documents: dict[str, Any] = {}
        if self.flatten and not by_document:
            if self._takes_cu_seqlens:
                cu_seqlens = find_boundaries(position_ids) if cu_seqlens is None else cu_seqlens
                # Otherwise transformers computes these on the GPU in every layer, and waits for the result.
                offsets, longest = copy_to_device(cu_seqlens, input_ids.device), int(cu_seqlens.diff().max())
                documents = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        (decoder,) = self._decoder
        # A cache or a mask would disable the isolation of packed documents.
        hidden: Tensor = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **documents).last_hidden_state
        if labels is None:
            return self.hf.get_output_embeddings()(hidden)
        if by_document:
            return self._compute_plain_losses(hidden[labels != IGNORED], labels[labels != IGNORED])
        flat = labels.reshape(-1)
        # With labels on the CPU, this does not wait for the GPU.
        trained = (flat != IGNORED).nonzero().squeeze(1)
        if isinstance(factor, Tensor):
            factor = copy_to_device(factor.reshape(-1)[trained], hidden.device)
        targets, trained = (copy_to_device(tensor, hidden.device) for tensor in (flat[trained], trained))
        selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, trained)
        del hidden  # freed while the loss is computed
        return self.hf.get_output_embeddings()(selected, targets, factor, per_token)

    def _compute_plain_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of `targets` [N]; only the logits of one chunk exist at a time."""
        head = self.hf.get_output_embeddings()

        def compute(hidden: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")

        chunks = [slice(start, start + head.chunk_tokens) for start in range(0, max(1, len(targets)), head.chunk_tokens)]
        return torch.cat([checkpoint(compute, hidden[chunk], targets[chunk], use_reentrant=False) for chunk in chunks])

    def parameters_by_name(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by their Hugging Face names; tied weights appear once."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}

    def buffers_by_name(self) -> Mapping[str, Tensor]:
        """Return the buffers that belong in weight files by their Hugging Face names."""
        return stored_buffers(self.hf)


def find_decoder(model: Any) -> Any:
    """Return the part of a model between token ids and hidden states.

    In some architectures, transformers' `get_decoder` returns the whole model, or the head if that is named decoder.
    """
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    parts = [decoder, *model.children()]
    with_embeddings = (part for part in parts if part is not model and any(module is embeddings for module in part.modules()))
    return next(with_embeddings, decoder)


def weights_gib(plan: LaunchPlan) -> float:
    """Return the GiB of all weights in the dtype that the model computes in."""
    return plan.model.num_params * DTYPES[plan.config.model.dtype].itemsize / 2**30


def build_model(
    model: ModelSection,
    facts: ModelFacts,
    device: str,
    chunk_tokens: int,
    packing: bool = True,
    make_progress: MakeProgress = ignore_progress,
    has_checkpoint: bool = False,
    checkpointing: str = NONE,
    uses_liger: bool = False,
    compiles: bool = False,
) -> CausalLMLoss:
    """Build the model that the plan names. Call it while an HfDeepSpeedConfig is alive.

    With `has_checkpoint`, weights are neither loaded nor initialized, because a checkpoint replaces them all.

    Raises:
        ConfigError: if the architecture is not a causal language model that can be trained here, or weights are missing.
    """
    # A lazy import of dynamo inside zero.Init fails on the patched tensor constructors.
    import torch._dynamo
    from transformers import AutoConfig

    folder = None
    if facts.path is not None:
        folder = folder_to_load(Path(facts.path), model.trust_remote_code, model.code_digest)
    remote = code_option(model.trust_remote_code, folder)
    config = (
        AutoConfig.from_pretrained(folder, **remote) if folder is not None else AutoConfig.for_model(**without_code(facts.config))
    )
    kernel = attention.choose_kernel(model, torch.device(device), config)
    if kernel == attention.VARLEN:
        if not attention.can_varlen(model, config, torch.device(device)):
            message = "the attention kernel varlen does not compute this architecture in this type on this device"
            raise ConfigError(message, where="model.attention", value=config.model_type, remedy="set model.attention=auto")
        attention.register_varlen()
    if kernel.startswith("flash_attention") and config.model_type in attention.FLASH_CROSSES_DOCUMENTS:
        message = "packed documents would affect each other in the FlashAttention of this architecture"
        raise ConfigError(message, where="model.attention", value=config.model_type, remedy="set model.attention=sdpa")
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "attn_implementation": kernel}
    liger_problem = ""
    if uses_liger:
        liger_problem = liger.find_problem(model, torch.device(device))
    hf = build_with_weights(config, model, facts, folder, make_progress, has_checkpoint, **options, **remote)
    replace_head(hf, chunk_tokens)
    if uses_liger and not liger_problem:
        liger_problem = liger.apply(hf, model, torch.device(device))
    checkpoint_layers(hf, checkpointing)
    if compiles:
        compile_layers(hf, torch.device(device))
    hf.train()
    # Models that cannot isolate documents train without packing. If their batches were flattened, rows would affect each other.
    flatten = packing and (kernel == attention.VARLEN or kernel.startswith("flash_attention"))
    return CausalLMLoss(hf, flatten, liger_problem)


def checkpoint_layers(hf: Any, checkpointing: str) -> None:
    """Make the layers that `checkpointing` names (all, none, every N) recompute their activations in the backward pass.

    Raises:
        ConfigError: if only some layers are named, and the architecture's layers cannot be selected individually.
    """
    if not checkpointing_interval(checkpointing):
        return
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if checkpointing_interval(checkpointing) == 1:
        return
    decoder_layers = find_layers(hf, "model.activation_checkpointing", "set model.activation_checkpointing to all or none")
    for layer, is_recomputed in zip(decoder_layers, checkpointed_layers(checkpointing, len(decoder_layers)), strict=True):
        layer.gradient_checkpointing = is_recomputed


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
    import torch._inductor.config
    import torch.compiler.config
    from deepspeed.utils import set_z3_leaf_module
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    setting = "model.compile"
    layers = find_layers(hf, setting, f"set {setting}=false")
    if problems := missing_build_tools(device.type):
        raise ConfigError(
            replace(one, message=f"{setting}: {one.message}", where=setting, remedy=f"{one.remedy}, or set {setting}=false")
            for one in problems
        )
    # There are only a few graphs, so use no helper processes; no public setting says so. This applies only to this thread:
    # autograd's threads use the value that torch's compiler read from the variable when launcher/train/preload.py imported it.
    torch._inductor.config.compile_threads = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"))
    # Training and evaluation, shapes, and kinds of layers each compile a variant of a layer.
    torch.compiler.config.recompile_limit = 64
    # Document boundaries are values that differ in each batch, so each batch would be compiled.
    kernel = attention.kernel_of(hf.config)
    if kernel in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(kernel, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[kernel]))
    for layer in layers:
        set_z3_leaf_module(layer, True)
        layer.forward = torch.compile(layer.forward)


def replace_head(hf: Any, chunk_tokens: int) -> None:
    """Make the model's head compute the loss, `chunk_tokens` labels at a time.

    Raises:
        ConfigError: if the head is not a plain linear layer.
    """
    head = hf.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"this architecture's head is a {type(head).__name__}, not a linear layer over the vocabulary",
            where="model.path",
            value=str(hf.config.model_type),
            remedy="choose a causal language model",
        )
    # Only the class changes, so weights, tying and DeepSpeed's bookkeeping are kept.
    head.__class__ = LossHead
    head.chunk_tokens = chunk_tokens


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face folder with bf16 weights and tokenizer; `folder` appears when complete."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers parses the file three times, and builds the table of names for each module: most of the time otherwise.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    # Given only a name, transformers reads a file of that name in the working directory, which may be another user's.
    path = str(file.absolute())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=path)
            hf = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=path, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
        # The weights are plain bf16, but the loader still marks them as quantized.
        hf.hf_quantizer = None
        if hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config
        tokenizer.save_pretrained(temporary)
        hf.save_pretrained(temporary)
        if not folder.exists():
            atomic_files.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
