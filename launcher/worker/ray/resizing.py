"""Ray Train ends the workers of an elastic run without a word when there is room for more of them; here they save first."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

_CALL_S = 30.0
_ASK_S = 0.2


class SaveBeforeResize(ControllerCallback):
    """Holds Ray Train's controller until the ranks have saved and left; while they do not write, for `grace_s` at most."""

    def __init__(self, coordinator: Any, grace_s: float) -> None:
        self._coordinator = coordinator
        self._grace_s = grace_s

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Only workers that are well are resized; after a failure the state is another."""
        if isinstance(current_state, ResizingState):
            until = time.monotonic() + self._grace_s
            while (said := self._ask()) != "gone" and time.monotonic() < until:
                if said == "busy":
                    # A save or an export takes as long as the model is large.
                    until = time.monotonic() + self._grace_s
                time.sleep(_ASK_S)

    def _ask(self) -> str | None:
        # Whatever is raised in here, and be it that storage holds the coordinator up, would end the run.
        with suppress(Exception):
            return str(ray.get(self._coordinator.make_way.remote(), timeout=_CALL_S))
        return None
