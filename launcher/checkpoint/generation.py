"""A model's settings for generation. No torch, no transformers: the submit side imports this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "generation_config.json"


def read_stop_ids(model: Path | Mapping[str, Any]) -> list[int]:
    """The tokens at which generations of a model stop by its own settings; `model` is its folder, or its config.json."""
    found = read_generation_config(model).get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def read_generation_config(model: Path | Mapping[str, Any]) -> dict[str, Any]:
    """The model's generation config; without one transformers takes these settings from config.json."""
    if isinstance(model, Path) and (model / FILE).is_file():
        return dict(json.loads((model / FILE).read_bytes()))
    config = model if isinstance(model, Mapping) else json.loads((model / "config.json").read_bytes())
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
