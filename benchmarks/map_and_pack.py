"""Turn text into packed rows with Hugging Face's libraries, as a user's script would: load, tokenize in processes, pack.

    python benchmarks/map_and_pack.py ROWS.jsonl MODEL MAX_LENGTH [--processes 2]

Rows have `messages`, or `prompt` and `completion`. The packed rows are in the cache of `datasets` (HF_DATASETS_CACHE). Prints
their files as JSON.
"""

from __future__ import annotations

import argparse
import json

from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from trl import pack_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="JSONL file")
    parser.add_argument("model", help="Hugging Face folder with the tokenizer")
    parser.add_argument("max_length", type=int, help="tokens in a packed row")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokenize(batch):
        if "messages" in batch:
            texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        else:
            pairs = zip(batch["prompt"], batch["completion"], strict=True)
            texts = [prompt + completion + tokenizer.eos_token for prompt, completion in pairs]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    rows = load_dataset("json", data_files=args.rows, split="train")
    tokens = rows.map(tokenize, batched=True, num_proc=args.processes, remove_columns=rows.column_names)
    packed = pack_dataset(tokens, args.max_length, "bfd")
    print(json.dumps([file["filename"] for file in packed.cache_files]))


if __name__ == "__main__":
    main()
