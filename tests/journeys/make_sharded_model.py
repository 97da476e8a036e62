"""Save a small model with random weights as several safetensors files with an index: python make_sharded_model.py FOLDER"""

import json
import subprocess
import sys

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

shown = subprocess.run(
    [sys.executable, "-m", "launcher", "plan", "model=tiny", "--json"], check=True, capture_output=True, text=True
)
model = json.loads(shown.stdout)["model"]
tokenizer = AutoTokenizer.from_pretrained(model["tokenizer_path"])
tokenizer.save_pretrained(sys.argv[1])
config = LlamaConfig.from_dict(model["config"])
LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="20KB")
