"""Settings that follow from the user's settings on the command line or in the run's file."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any

from launcher.config.command_line import override_key
from launcher.config.sections.fields import derive_name

# Hydra's flags that replace the files in conf/.
_OTHER_FILES = ("--config-name", "-cn", "--config-path", "-cp")
# Values of data.path and data.sources that name nothing to read.
_NO_ROWS = ("", "null", "[]")


def unset_other_length(values: dict[str, Any], overrides: Sequence[str], file_keys: Sequence[str]) -> None:
    """Unset train.epochs if the command line, or else the run's file, sets train.max_steps; and the reverse."""
    lengths = {"train.max_steps", "train.epochs"}
    keys = lengths.intersection(map(override_key, overrides)) or lengths.intersection(file_keys)
    has_steps, has_epochs = "train.max_steps" in keys, "train.epochs" in keys
    train = values.get("train")
    if isinstance(train, dict) and has_steps != has_epochs:
        chosen, other = ("max_steps", "epochs") if has_steps else ("epochs", "max_steps")
        if train.get(chosen) is not None:
            train[other] = None


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
