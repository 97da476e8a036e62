"""Inputs for benchmarks/gpu.py: a model folder with random weights and a byte tokenizer, and chats of random words.

    python benchmarks/gpu_inputs.py --config CONFIG.json --dtype bf16 --folder DIR --row-tokens 4096 --tokens 1000000

Nothing is downloaded. Writes DIR/model and DIR/chats.jsonl. A token is a byte, so each chat has the drawn number of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

_WORDS = ("gradient", "shard", "rank", "token", "layer", "packed", "optimizer", "step", "batch", "kernel", "node", "weight")
_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The most tokens that the template adds to a chat, and the prompt's share of the words.
_TEMPLATE_TOKENS, _PROMPT_SHARE = 40, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the model's config.json")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--row-tokens", type=int, required=True, help="tokens of the longest chat")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of all chats")
    args = parser.parse_args()
    write_chats(args.folder / "chats.jsonl", args.row_tokens, args.tokens)
    if not (args.folder / "model").is_dir():
        write_model(args.folder / "model", json.loads(args.config.read_text()), args.dtype)
    print(json.dumps({"free_gib": _free_gib()}), flush=True)


def _free_gib() -> float | None:
    """Return the memory of the first GPU that other processes do not use; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) / 2**30


def write_chats(file: Path, row_tokens: int, num_tokens: int) -> None:
    """Write chats of 1/16 row to a whole row, mostly short ones, until there are `num_tokens` tokens."""
    draw, written = random.Random(0), 0
    with open(file, "w", encoding="utf-8") as out:
        while written < num_tokens:
            length = int(row_tokens * 16 ** -draw.random())
            size = max(16, length - _TEMPLATE_TOKENS)
            prompt, completion = _text(draw, int(_PROMPT_SHARE * size)), _text(draw, size - int(_PROMPT_SHARE * size))
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            out.write(json.dumps({"messages": turns}) + "\n")
            written += length


def _text(draw: random.Random, num_bytes: int) -> str:
    """Return random words of at most `num_bytes` bytes, starting with a number so that no two texts are alike."""
    words = [f"{draw.getrandbits(24)}"]
    while sum(map(len, words)) + len(words) < num_bytes:
        words += draw.choices(_WORDS, k=max(1, num_bytes // 16))
    return " ".join(words)[: max(num_bytes, 1)].strip()


def write_model(folder: Path, values: dict[str, Any], dtype: str) -> None:
    """Draw the weights, on a GPU if there is one, and save them with the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**values)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": _END, "pad_token": _PAD, "additional_special_tokens": [_START]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_TEMPLATE, **special)


if __name__ == "__main__":
    main()
