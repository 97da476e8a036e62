"""The model under ZeRO-3: built partitioned, with a head that returns the loss.

Under an HfDeepSpeedConfig, each rank reads its own part of the weights if the files store them as the model has them, or in the
parts that transformers fuses. Otherwise Hugging Face's `from_pretrained` partitions each weight while rank 0 loads it. No rank
ever holds the whole model.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher import atomic_files
from launcher.checkpoint.initial_weights import StoredTensor, can_fill, can_fuse, fill, find_sources
from launcher.config.schema import ModelSection
from launcher.data.loader import IGNORED, find_boundaries
from launcher.distributed import copy_to_device
from launcher.errors import ConfigError
from launcher.models.private_code import code_option, folder_to_load
from launcher.models.remote_code import kernel_problems, without_code
from launcher.models.weight_files import WeightReport, read_header, weight_files
from launcher.plan.launch_plan import LaunchPlan, ModelFacts
from launcher.plan.sizing.checkpointed_layers import NONE, checkpointed_layers, interval
from launcher.tracking.progress import MakeProgress, silent
from launcher.train.kernels import attention, fp8, layers, liger
from launcher.train.loss import LossHead

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Name endings of buffers that are filled, in fp32, when a model is built.
_BUILT_BUFFERS = ("inv_freq", "embed_scale")
# Prefixes of transformers' errors for weights whose shape does not match the model, or that cannot be fused.
_MISMATCH_ERRORS = ("Error(s) in loading state_dict", "Failed to apply weight conversion")


class CausalLMLoss(nn.Module):
    """A Hugging Face model with a forward pass that returns the loss over trained labels."""

    def __init__(self, model: nn.Module, flatten: bool, liger_problem: str = "", fp8_use: str = "") -> None:
        super().__init__()
        self.hf = model
        # Why Liger is not used although the plan assumes it.
        self.liger_problem = liger_problem
        # Which layers compute in FP8; empty if none does.
        self.fp8_use = fp8_use
        # FlashAttention and varlen keep documents apart only in a batch of one row.
        self.flatten = flatten
        # In a tuple, so that torch does not register the module twice.
        self._decoder = (_find_decoder(model),)
        # Remote code may lack the keyword arguments of transformers' models.
        parameters = inspect.signature(self._decoder[0].forward).parameters.values()
        self._takes_cu_seqlens = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        factor: float = 1.0,
        cu_seqlens: Tensor | None = None,
        by_model: bool = False,
        per_token: bool = False,
    ) -> Tensor:
        """Return the summed negative log-likelihood over `labels` [B, T], without IGNORED, times `factor`: an fp32 scalar.

        With `per_token`, return the negative log-likelihood of each label instead, fp32 [N], without a gradient. Without labels,
        return logits [B, T, V] ([1, B * T, V] if `flatten`). All passes use this method, because ZeRO-3 gathers
        weights around it. `cu_seqlens`, from a MicroBatch, saves the pass from searching `position_ids` for document boundaries.
        With `by_model`, return the logits that the whole Hugging Face model computes from the ids alone.
        """
        if by_model:
            return self.hf(input_ids=input_ids, use_cache=False).logits
        hidden = self._hidden(input_ids, position_ids, cu_seqlens)
        if labels is None:
            return self.hf.get_output_embeddings()(hidden)
        flat = labels.reshape(-1)
        # With labels on the CPU, this does not wait for the GPU.
        trained = (flat != IGNORED).nonzero().squeeze(1)
        targets, trained = (copy_to_device(tensor, hidden.device) for tensor in (flat[trained], trained))
        selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, trained)
        del hidden  # freed while the loss is computed
        return self.hf.get_output_embeddings()(selected, targets, factor, per_token)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the last hidden states [B, T, H] (or [1, B * T, H]) of token ids and positions [B, T]."""
        documents: dict[str, Any] = {}
        if self.flatten:
            if self._takes_cu_seqlens:
                cu_seqlens = find_boundaries(position_ids) if cu_seqlens is None else cu_seqlens
                # Otherwise transformers computes these on the GPU in every layer, and waits for the result.
                offsets, longest = copy_to_device(cu_seqlens, input_ids.device), int(cu_seqlens.diff().max())
                documents = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        # A cache or a mask would disable the isolation of packed documents.
        (decoder,) = self._decoder
        return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **documents).last_hidden_state

    def parameters_by_name(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by their Hugging Face names; tied weights appear once."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}


def _find_decoder(model: Any) -> Any:
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
    make_progress: MakeProgress = silent,
    has_checkpoint: bool = False,
    checkpointing: str = NONE,
    uses_liger: bool = False,
    whole_layers: bool = False,
    compiles: bool = False,
    uses_fp8: bool = False,
) -> CausalLMLoss:
    """Build the model that the plan names. Call it while an HfDeepSpeedConfig is alive.

    With `has_checkpoint`, weights are neither loaded nor initialized, because a checkpoint replaces them all.

    Raises:
        ConfigError: if the architecture is not a causal language model that can be trained here, weights are missing, or a
            rank cannot compute in FP8.
    """
    # A lazy import of dynamo inside zero.Init fails on the patched tensor constructors.
    import torch._dynamo
    from transformers import AutoConfig, AutoModelForCausalLM

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
    liger_problem = fp8_use = ""
    if uses_fp8:
        fp8.require_usable(torch.device(device))
    if uses_liger:
        liger_problem = liger.find_problem(model, str(config.model_type), torch.device(device), options["dtype"])
    hf = _build_empty(config, **options, **remote) if has_checkpoint else None
    if hf is None and folder is not None and facts.path is not None and model.init == "pretrained" and facts.has_weights:
        pickled = {} if model.allow_pickled_weights else {"use_safetensors": True}
        advance = make_progress("loading the weights", facts.num_params * options["dtype"].itemsize)
        hf = _load_own_parts(Path(facts.path), model, config, advance, **options, **remote)
        if hf is None:
            with _counted_loading(advance):
                hf = _load_pretrained(folder, facts.path, model, **options, **remote, **pickled)
    elif hf is None:
        hf = AutoModelForCausalLM.from_config(config, **options, **remote)
    _replace_head(hf, chunk_tokens)
    if uses_liger and not liger_problem:
        liger_problem = liger.apply(hf, model, torch.device(device))
    if uses_fp8:
        fp8_use = fp8.convert(hf, layers.find_layers(hf, "model.fp8", "set model.fp8=false"), compiles)
    checkpoint_layers(hf, checkpointing)
    if whole_layers or compiles:
        setting = "model.compile" if compiles else "deepspeed.whole_layers"
        decoder_layers = layers.find_layers(hf, setting, f"set {setting}=false")
        layers.gather_whole(decoder_layers)
        if compiles:
            layers.compile_layers(hf, decoder_layers, torch.device(device))
    hf.train()
    # Models that cannot isolate documents train without packing. If their batches were flattened, rows would affect each other.
    flatten = packing and (kernel == attention.VARLEN or kernel.startswith("flash_attention"))
    return CausalLMLoss(hf, flatten, liger_problem, fp8_use)


def read_own_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read config.json with transformers. Load the model with the result, so that no other user can change the file in between.

    Raises:
        ConfigError: if the config takes the attention kernel from the Hub.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **code_option(trust_remote_code, folder))
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    implementations = {"attn_implementation": [str(getattr(part, "_attn_implementation", "")) for part in parts]}
    if problems := list(kernel_problems(implementations, str(folder / "config.json"))):
        raise ConfigError(problems)
    return config


def _build_empty(config: Any, **options: Any) -> Any:
    """Build a model whose weights have no values; None if it has buffers that only loading or initialization fills.

    Checkpoints hold no buffers. Rotary frequency tables and the embedding scale get their values when the model is built.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import deepspeed

    # Under ZeRO-3, transformers would gather and initialize the weights of each module.
    initialize = deepspeed.initialize_weights_zero3
    deepspeed.initialize_weights_zero3 = lambda model: None
    try:
        hf = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    finally:
        deepspeed.initialize_weights_zero3 = initialize
    weights = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    tables = [name for name, buffer in hf.named_buffers() if buffer.is_floating_point() and not name.endswith(_BUILT_BUFFERS)]
    return hf if weights.issuperset(hf.state_dict()) and not tables else None


def checkpoint_layers(hf: Any, checkpointing: str) -> None:
    """Make the layers that `checkpointing` names (all, none, every N) recompute their activations in the backward pass.

    Raises:
        ConfigError: if only some layers are named, and the architecture's layers cannot be selected individually.
    """
    if not interval(checkpointing):
        return
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if interval(checkpointing) == 1:
        return
    decoder_layers = layers.find_layers(hf, "model.activation_checkpointing", "set model.activation_checkpointing to all or none")
    for layer, is_recomputed in zip(decoder_layers, checkpointed_layers(checkpointing, len(decoder_layers)), strict=True):
        layer.gradient_checkpointing = is_recomputed


@contextmanager
def _counted_loading(on_load: Callable[[int], None]) -> Iterator[None]:
    """Call `on_load` with the bytes of each module's parameters as transformers fills them; under ZeRO-3, only on rank 0."""
    fill = nn.Module._load_from_state_dict

    def fill_and_count(module: nn.Module, *arguments: Any) -> None:
        fill(module, *arguments)
        on_load(sum(parameter.nbytes for parameter in module.parameters(recurse=False)))

    nn.Module._load_from_state_dict = fill_and_count
    try:
        yield
    finally:
        nn.Module._load_from_state_dict = fill


def _load_own_parts(folder: Path, model: ModelSection, config: Any, on_fill: Callable[[int], None], **options: Any) -> Any:
    """Load a partitioned model, each rank reading only its own part; None without ZeRO-3, or if the files prevent it.

    Raises:
        ConfigError: if the files lack a part of a tensor that transformers fuses, or a file is incomplete.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations import is_deepspeed_zero3_enabled

    files = weight_files(folder, with_pickled=False)
    if not is_deepspeed_zero3_enabled() or not files or getattr(config, "quantization_config", None):
        return None
    # find_sources decides; this saves the time of building a model that it would not accept.
    transforms = get_checkpoint_conversion_mapping(config.model_type) or ()
    if not all(can_fuse(transform) for transform in transforms if isinstance(transform, WeightConverter)):
        return None
    headers = ((file, name, tensor) for file in files if file.is_file() for name, tensor in read_header(file).items())
    stored = {name: StoredTensor(file, name, tensor.dtype, tensor.shape, tensor.offset) for file, name, tensor in headers}
    hf = _build_empty(config, **options)
    sources = find_sources(hf, stored) if hf is not None else None
    if sources is None:
        return None
    if sources.missing:
        raise ConfigError(WeightReport(missing=tuple(sorted(sources.missing))).problems(folder, model))
    if not can_fill(hf, sources.by_name):
        return None
    fill(hf, sources.by_name, on_fill)
    return hf


def _load_pretrained(folder: Path, path: str, model: ModelSection, **options: Any) -> Any:
    """Load the model with all of its weights from a folder; messages name it by `path`, which the user knows.

    Raises:
        ConfigError: if weights are missing or have another shape; transformers would initialize them randomly.
    """
    from transformers import AutoModelForCausalLM

    try:
        hf, loading = AutoModelForCausalLM.from_pretrained(folder, **options, output_loading_info=True)
    except RuntimeError as error:
        # A GPU that runs out of memory also raises a RuntimeError.
        if not str(error).startswith(_MISMATCH_ERRORS):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        message = f"the weight files do not fit the model: {next((line for line in lines if 'size mismatch' in line), lines[0])}"
        remedy = "compare them before you request a GPU: python -m launcher data, with the settings of the run"
        raise ConfigError(message, where="model.path", value=path, remedy=remedy) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(WeightReport(missing=tuple(missing)).problems(Path(path), model))
    return hf


def _replace_head(hf: Any, chunk_tokens: int) -> None:
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
