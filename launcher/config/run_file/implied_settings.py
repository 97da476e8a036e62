"""Settings that follow from the user's settings on the command line or in the run's file."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any

from launcher.config.command_line import override_key
from launcher.config.origin import COMMAND_LINE, Origins, short
from launcher.config.sections.fields import derive_name

# Hydra's flags that replace the files in conf/.
_OTHER_FILES = ("--config-name", "-cn", "--config-path", "-cp")
# Values of data.path and data.sources that name nothing to read.
_NO_ROWS = ("", "null", "[]")
# Settings that replace each other.
_ALTERNATIVES = (("train", ("max_steps", "epochs")), ("data", ("eval_fraction", "eval_path")), ("data", ("path", "sources")))


def settle_alternatives(cfg: Any, origins: Origins) -> list[str]:
    """Of settings that replace each other, keep those that the latest layer sets; unset the others and return their keys.

    The layers are the command line, the run's file, and the files in conf/ from the last composed one to the first.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(cfg, resolve=False)
    layers = [COMMAND_LINE, *(short(file) for file, _ in origins.files())]
    replaced = []
    for section, names in _ALTERNATIVES:
        content = values.get(section) if isinstance(values.get(section), dict) else {}
        if "sources" in names and "${data.path}" in str(content.get("sources")):
            continue
        where = {name: origins.written_at(f"{section}.{name}") for name in names if content.get(name) is not None}
        layer = {name: layers.index(text.rpartition(":")[0] or text) for name, text in where.items() if text}
        for name in layer:
            # Without data.sources, nothing would read data.path.
            if layer[name] > min(layer.values()) and name != "sources":
                OmegaConf.update(cfg, f"{section}.{name}", 0.0 if name == "eval_fraction" else None)
                replaced.append(f"{section}.{name}")
    return replaced


def name_model_after_path(values: dict[str, Any], keys: Set[str]) -> None:
    """Name the model after its path if the user's `keys` include the path but neither a name nor an option of the group."""
    model = values.get("model")
    if "model.path" in keys and keys.isdisjoint(("model", "model.name", "experiment")) and isinstance(model, dict):
        last = str(model.get("path")).removeprefix("run:").rstrip("/").rpartition("/")[2]
        model["name"] = derive_name(last.partition("@")[0].removesuffix(".gguf")) or model.get("name")


def needs_own_rows(words: Sequence[str], file_choices: Collection[str]) -> bool:
    """Return whether a command line names rows but no group option that reads them; a run's file may select one.

    `file_choices` are the groups whose option the run's file selects.
    """
    values = {override_key(word): word.partition("=")[2] for word in words if not word.startswith(("-", "~"))}
    if not values.keys().isdisjoint(("data", "experiment")) or any(word.partition("=")[0] in _OTHER_FILES for word in words):
        return False
    if all(values.get(key, "") in _NO_ROWS for key in ("data.path", "data.sources")):
        return False
    return "data" not in file_choices and "experiment" not in file_choices
