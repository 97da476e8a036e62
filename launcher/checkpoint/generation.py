"""A model's generation config, read without torch and transformers: the submit side imports this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "generation_config.json"


def read_stop_ids(model: Path | Mapping[str, Any]) -> list[int]:
    """Return the token ids at which the model's own settings stop generation; `model` is its folder or its config.json."""
    eos = read_generation_config(model).get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def read_generation_config(model: Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's generation config; without that file, the settings that transformers takes from config.json."""
    if isinstance(model, Path) and (model / FILE).is_file():
        return dict(json.loads((model / FILE).read_bytes()))
    config = model if isinstance(model, Mapping) else json.loads((model / "config.json").read_bytes())
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
