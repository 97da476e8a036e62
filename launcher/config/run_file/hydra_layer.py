"""A run's file as a config of Hydra: composed after the groups and the experiment, before the overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launcher.config.hydra_location import RUN_FILE_GROUP
from launcher.config.run_file.reading import FileContent

# Hydra needs a group and an option for each config; these stand in no folder.
_OPTION = "settings"
OVERRIDE = f"+{RUN_FILE_GROUP}={_OPTION}"


@contextmanager
def composable(content: FileContent | None) -> Iterator[list[str]]:
    """Let Hydra compose the content of a run's file within this block; yields the override that includes it."""
    if content is None:
        yield []
        return
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group=RUN_FILE_GROUP, name=_OPTION, node=content.for_hydra(), package="_global_")
    try:
        yield [OVERRIDE]
    finally:
        store.repo.pop(RUN_FILE_GROUP, None)
