"""state.json: the part of a checkpoint that is not tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.checkpoint.manifest import STATE
from launcher.errors import CheckpointError
from launcher.plan.launch_plan import Record
from launcher.plan.optimizers import OPTIMIZERS


class State(Record):
    """`parameters` are full shapes by name, `optimizer_states` the names in shards; `extra` is the training loop's own."""

    parameters: dict[str, tuple[int, ...]]
    optimizer_step: int
    # A file without this field is AdamW's.
    optimizer_states: tuple[str, ...] = OPTIMIZERS["adamw"].states
    loss_scaler: dict[str, float]
    engine: dict[str, int]
    extra: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=2) + "\n"


def read_state(path: Path) -> State:
    """Read the state.json of a checkpoint directory."""
    file = path / STATE
    try:
        return State.model_validate(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        text = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise CheckpointError("a checkpoint's state cannot be read", where=str(file), value=text) from error
