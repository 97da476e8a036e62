"""The files of a model's folder beside its weights: those that may be copied, and the settings of generation.

Without torch and transformers: the submit side imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import Problem

GENERATION_CONFIG = "generation_config.json"
# The files that an export and a mirror copy in addition to the weights.
COPIED = (
    *(
        "*.json",
        "*.jinja",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "*.py",
        "tokenizer*",
        "vocab.*",
        "merges*",
        "spiece*",
        "sentencepiece*",
    ),
    *("chat_template*", "additional_chat_templates", "LICENSE*", "NOTICE*", "README.md"),
)

# Files that are loaded: through a link, an export would write the tensors of another file on this machine.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def link_problems(folder: Path, paths: Iterable[Path] | None = None) -> Iterator[Problem]:
    """Yield a problem for each of `paths`, and each file below them, that leads out of the folder by a link.

    In a folder from another user, a link such as `LICENSE -> ~/.ssh/id_rsa` would copy a private file from this machine into the
    export, the Hub repository or the mirror.

    Without `paths`, it checks the weights, and the files that an export or a mirror may copy. Links may lead to blobs of the Hub.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    own = folder.resolve()
    caches = [Path(HF_HUB_CACHE).resolve(), *([own.parents[2]] if own.parent.name == "snapshots" else [])]
    if paths is None:
        paths = {path for pattern in (*COPIED, *_WEIGHTS) for path in folder.glob(pattern)}
    for path in sorted(paths):
        for file in (path, *(sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else ())):
            target = file.resolve()
            is_blob = any(target.is_relative_to(cache) and "blobs" in target.relative_to(cache).parts for cache in caches)
            if not target.is_relative_to(own) and not is_blob:
                name = file.relative_to(folder)
                message = f"the file {name} is a link to a file outside the folder: {target}"
                remedy = "replace it with a copy of the intended file, or remove it"
                yield Problem(message, where=str(file), value=str(name), remedy=remedy)


def read_stop_ids(model: Path | Mapping[str, Any]) -> list[int]:
    """Return the token ids at which the model's own settings stop generation; `model` is its folder or its config.json."""
    eos = read_generation_config(model).get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def read_generation_config(model: Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's generation config; without that file, the settings that transformers takes from config.json."""
    if isinstance(model, Path) and (model / GENERATION_CONFIG).is_file():
        return dict(json.loads((model / GENERATION_CONFIG).read_bytes()))
    config = model if isinstance(model, Mapping) else json.loads((model / "config.json").read_bytes())
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
