"""Settings that follow from what the user wrote, on the command line or in the run's file."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any

from launcher.config.command_line import override_key
from launcher.config.sections.fields import derive_name

# Hydra's flags that replace the files below conf/.
_OTHER_FILES = ("--config-name", "-cn", "--config-path", "-cp")


def unset_other_length(values: dict[str, Any], overrides: Sequence[str], file_keys: Sequence[str]) -> None:
    """Unset train.epochs of the files where the command line, or else the run's file, sets train.max_steps, or the reverse."""
    lengths = {"train.max_steps", "train.epochs"}
    keys = lengths.intersection(map(override_key, overrides)) or lengths.intersection(file_keys)
    has_steps, has_epochs = "train.max_steps" in keys, "train.epochs" in keys
    train = values.get("train")
    if isinstance(train, dict) and has_steps != has_epochs:
        chosen, other = ("max_steps", "epochs") if has_steps else ("epochs", "max_steps")
        if train.get(chosen) is not None:
            train[other] = None


def name_model_after_path(values: dict[str, Any], keys: Set[str]) -> None:
    """Name the model after the path among the `keys` of the user, where they have neither a name nor an option of the group."""
    model = values.get("model")
    if "model.path" in keys and keys.isdisjoint(("model", "model.name", "experiment")) and isinstance(model, dict):
        last = str(model.get("path")).removeprefix("run:").rstrip("/").rpartition("/")[2]
        model["name"] = derive_name(last.partition("@")[0].removesuffix(".gguf")) or model.get("name")


def needs_own_rows(words: Sequence[str], file_choices: Collection[str]) -> bool:
    """Return whether a command line has data.path without the group option that reads it; a run's file may choose one.

    `file_choices` are the groups of which the run's file selects an option.
    """
    keys = {override_key(word) for word in words if not word.startswith(("-", "~"))}
    if "data.path" not in keys or not keys.isdisjoint(("data", "data.sources", "experiment")):
        return False
    if any(word in ("data.path=null", "data.path=") or word.partition("=")[0] in _OTHER_FILES for word in words):
        return False
    return "data" not in file_choices and "experiment" not in file_choices
