"""The sections for the run as a whole: its name and limits, where its metrics go, and prices to compare it with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.config.sections.fields import Count, Name, Positive, SettingsSection, Text, matching


class RunSection(SettingsSection):
    """Name, directory, seed and limits of the run."""

    name: Name | None = Field(
        None,
        description=(
            "Name of the run and of its directory. Unset: the name of the run's file, or else of model and data, followed by the "
            "time of submission."
        ),
    )
    root: Text = Field("runs", description="Folder that holds run directories; on a cluster, all nodes must share it.")
    seed: Count = Field(42, description="Seeds weight initialization and, together with the epoch, the order of rows.")
    max_hours: Positive | None = Field(
        None,
        description=(
            "Hours after which the run saves and stops, summed over all attempts; time in a queue does not count. Raise it to "
            "resume a run that reached it. Unset: no limit."
        ),
    )
    max_usd: Positive | None = Field(
        None,
        description=(
            "Cost in US dollars at which the run saves and stops: the GPU hours of all attempts, each at its own price. Raise "
            "it to resume a run that reached it. Needs cluster.price_per_gpu_hour; a typical price is not used."
        ),
    )
    confirm_usd: Positive | None = Field(
        None,
        description=(
            "Cost in US dollars above which `train` asks before it starts, and `resume` before the run gets more steps. They "
            "compare the highest cost that is expected or that a limit allows, for all runs of the command together, and also "
            "ask if a cost is unknown. Without a terminal, they refuse to start unless --yes is given. Unset: they never ask."
        ),
    )


# W&B refuses longer tags.
Tag = Annotated[Name, matching(r".{1,64}", "is longer than W&B's limit of 64 characters; shorten it")]


class TrackingSection(SettingsSection):
    """Where metrics go besides metrics.jsonl and the terminal."""

    kind: Literal["wandb", "none"] = Field(
        "wandb", description="wandb: Weights & Biases; none: only metrics.jsonl and the terminal."
    )
    project: Name = Field("launcher", description="W&B project.")
    entity: Name | None = Field(None, description="W&B user or team. Unset: the account's default.")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online if WANDB_API_KEY or a W&B login is found, else offline. disabled: no W&B."
    )
    group: Name | None = Field(None, description="W&B group.")
    tags: tuple[Tag, ...] = Field((), description="W&B tags, of at most 64 characters.")
