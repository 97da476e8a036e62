"""Makes a run's file a Hydra config: composed after the groups and the experiment, before the overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launcher.config.hydra_composition.location import RUN_FILE_GROUP, broken_reference
from launcher.config.origin import short
from launcher.config.run_file.reading import FileContent
from launcher.errors import ConfigError
from launcher.security.redaction import redact

# Hydra needs a group and an option for each config; these exist in no folder.
_OPTION = "settings"
OVERRIDE = f"+{RUN_FILE_GROUP}={_OPTION}"


@contextmanager
def composable(content: FileContent | None) -> Iterator[list[str]]:
    """Let Hydra compose the content of a run's file within this block; yield the override that includes it.

    Raises:
        ConfigError: if the file has a key or a value of a kind that settings cannot have.
    """
    if content is None:
        yield []
        return
    from hydra.core.config_store import ConfigStore
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    try:
        store.store(group=RUN_FILE_GROUP, name=_OPTION, node=content.for_hydra(), package="_global_")
    except (OmegaConfBaseException, RecursionError) as error:
        reason = redact(str(error).splitlines()[0])
        remedy = "write keys as texts, and a reference as ${section.name}"
        where = f"{short(content.file.path)}:{broken_reference(content.file.path) or 1}"
        raise ConfigError(f"the file is not read: {reason}", where=where, remedy=remedy) from None
    try:
        yield [OVERRIDE]
    finally:
        store.repo.pop(RUN_FILE_GROUP, None)
