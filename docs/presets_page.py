"""Write docs/presets.md from the models under conf/model and the experiments under conf/experiment.

python docs/presets_page.py            write the page
python docs/presets_page.py --check    exit 1 if the page is outdated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from settings_page import about_file

from launcher.config.compose import compose_one, conf_dir
from launcher.config.schema import RunConfig
from launcher.config.sections.train import DeepSpeedSection
from launcher.plan.architecture import model_facts
from launcher.plan.checkpoints import checkpoint_bytes
from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import Memory, ModelFacts, Topology
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.sizing.combinations import SizingInputs, choose_combination
from launcher.plan.sizing.memory import estimate_model_states

PAGE = Path(__file__).resolve().with_name("presets.md")
GPU, GPUS_PER_NODE, MOST_GPUS, ROW_TOKENS = "H100-80GB", 8, 1024, 4096

# By the start of the repository's name; the longest one counts. A license is the model card's field `license`, or `license_name`
# if that is `other`: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
LICENSES = {
    "HuggingFaceTB/SmolLM2-": "apache-2.0",
    "HuggingFaceTB/SmolLM3-": "apache-2.0",
    "Qwen/Qwen2.5-": "apache-2.0",
    "Qwen/Qwen2.5-3B": "qwen-research",
    "Qwen/Qwen2.5-72B": "qwen",
    "Qwen/Qwen3-": "apache-2.0",
    "allenai/OLMo-2-": "apache-2.0",
    "allenai/OLMoE-": "apache-2.0",
    "google/gemma-": "gemma",
    "meta-llama/": "llama",
    "meta-llama/Llama-3.1-": "llama3.1",
    "meta-llama/Llama-3.2-": "llama3.2",
    "meta-llama/Llama-3.3-": "llama3.3",
    "microsoft/phi-4": "mit",
    "mistralai/Mistral-7B-": "apache-2.0",
    "mistralai/Mistral-Nemo-": "apache-2.0",
    "mistralai/Mistral-Small-24B-": "apache-2.0",
}

_HEAD = f"""\
# Presets

```sh
python -m launcher plan model=qwen3_8b cluster.gpu_type={GPU} cluster.ranks_per_node=8
python -m launcher plan experiment=llama3_8b_one_node data.path=my.jsonl
```

Written by `make settings` from the files under `conf/model` and `conf/experiment`; `docs/presets_page.py` computes the numbers.

## Models

The file of a preset has what planning needs, so `plan` needs no network. Training uses the model's own config.json. No preset
pins a revision: set `model.revision`. **Gated** models need an account that accepted the license, and its `HF_TOKEN`. The license
is the one that the model card names; its text is on the page of the weights.

- {GPU}: the fewest GPUs whose planned peak fits, with rows of {ROW_TOKENS:,} tokens: 1, 2, 4 or whole nodes of {GPUS_PER_NODE}.
- Main memory: of all nodes together, with `deepspeed=zero3_offload`. Then no states are on the GPUs.
- Checkpoint: the size of one, and of the copy in main memory while it is written in the background.

Parameters are those of the weights on the Hub, where tied embeddings count once.
"""


def render() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *_models(), "\n## Experiments\n", *_experiments(), ""])


def _models() -> Iterator[str]:
    yield f"| `model=` | weights | license | parameters | {GPU} | main memory | checkpoint |"
    yield "|---|---|---|---|---|---|---|"
    facts = {}
    for file in (conf_dir() / "model").glob("*.yaml"):
        config = composed(f"model={file.stem}").model
        if config.path is not None and config.config is not None:
            facts[file] = model_facts(config.config, config.path, None, None)
    for file, model in sorted(facts.items(), key=lambda item: (_family(item[0]), item[1].num_params)):
        path = model.path or ""
        license_prefix = max((prefix for prefix in LICENSES if path.startswith(prefix)), key=len, default=None)
        gated = ", **gated**" if "(gated" in about_file(file) else ""
        cells = (
            f"`{file.stem}`",
            f"[{model.path}](https://huggingface.co/{model.path}){gated}",
            LICENSES[license_prefix] if license_prefix else "see its page",
            f"{model.num_params:,}",
            _fewest_gpus(file, model),
            f"{_states(model, 1, 'cpu').host_per_node_gib:,.0f} GiB",
            f"{checkpoint_bytes(model.num_params, OPTIMIZERS['adamw']) / 2**30:,.0f} GiB",
        )
        yield f"| {' | '.join(cells)} |"


def _family(file: Path) -> str:
    return file.stem.partition("_")[0]


def _fewest_gpus(file: Path, model: ModelFacts) -> str:
    num_gpus, config = 1, composed(f"model={file.stem}", f"data.max_length={ROW_TOKENS}", "train.micro_batch_size=1")
    while not _fits(config, model, num_gpus):
        num_gpus = num_gpus * 2 if num_gpus < GPUS_PER_NODE else num_gpus + GPUS_PER_NODE
    return str(num_gpus)


def _fits(config: RunConfig, model: ModelFacts, num_gpus: int) -> bool:
    # Two rows per GPU make gradients accumulate, which takes the most memory.
    train = config.train.model_copy(update={"global_batch_size": 2 * num_gpus})
    config = config.model_copy(update={"train": train})
    return choose_combination(SizingInputs(config, model, None, _topology(num_gpus), GPUS[GPU], GPUS[GPU].memory_gib)).fits


def _topology(num_gpus: int) -> Topology:
    nodes = -(-num_gpus // GPUS_PER_NODE)
    return Topology(nodes=nodes, ranks_per_node=num_gpus // nodes, world_size=num_gpus, device="cuda", backend="nccl")


def _states(model: ModelFacts, num_gpus: int, offload: str) -> Memory:
    topology = _topology(num_gpus)
    deepspeed = DeepSpeedSection(offload_optimizer=offload, offload_params=offload)
    # With accumulation, because gradients then take the most memory.
    return estimate_model_states(model.num_params, "bf16", 2, OPTIMIZERS["adamw"], deepspeed, topology, GPUS[GPU].memory_gib)


def _experiments() -> Iterator[str]:
    yield "| `experiment=` | GPUs | DeepSpeed | batch | length | learning rate | what |"
    yield "|---|---|---|---|---|---|---|"
    rows = []
    for file in (conf_dir() / "experiment").glob("*.yaml"):
        composed_file = compose_one([f"experiment={file.stem}", "data.path=rows.jsonl"])
        config = composed_file.config
        num_gpus = config.cluster.nodes * (config.cluster.ranks_per_node or 1)
        cells = (
            f"`{file.stem}`",
            str(num_gpus),
            f"`{composed_file.origins.choices['deepspeed']}`",
            str(config.train.global_batch_size),
            f"{config.data.max_length:,}",
            f"{config.optim.lr:g}",
            about_file(file).partition(". ")[0],
        )
        rows.append((num_gpus, file.stem, f"| {' | '.join(cells)} |"))
    for _, _, row in sorted(rows):
        yield row


def composed(*tokens: str) -> RunConfig:
    """Return the settings of a command line."""
    return compose_one(tokens).config


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description="Write or check docs/presets.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is outdated")
    if not parser.parse_args(argv).check:
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render():
        return 0
    print("docs/presets.md does not match the files under conf/; write it with: make settings", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
