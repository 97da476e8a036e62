"""The settings of Slurm. The pattern of each text refuses characters that could end a line, a word or a quotation in a script."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from launcher.config.sections.cluster import ManagedSection
from launcher.config.sections.fields import Count, Flag, PositiveInt, matching, number_as_text

# sbatch options that the launcher sets itself, from its own settings or from the plan.
OWN_SBATCH_PARAMETERS = re.split(
    r"\s+",
    "account array chdir cpus-per-task error exclusive export export-file get-user-env gid gpus gpus-per-node input job-name "
    "no-requeue nodes ntasks ntasks-per-node open-mode output parsable partition requeue signal test-only time uid wait wrap",
)

_WORD = r"[A-Za-z0-9][\w.@+-]*"
_PATH = r"/[\w.+@/-]*"
# Words that a shell does not run as commands.
_RESERVED_WORD = "case|coproc|do|done|elif|else|esac|fi|for|function|if|select|then|until|while"
# Values are not expanded, so PATH would lose the folders of Slurm's commands. The other variables belong to bash, Slurm, submitit
# and the launcher. LD_PRELOAD, BASH_ENV and similar variables are allowed: the job runs the user's own commands anyway.
_RESERVED_VARIABLE = (
    r"PATH|(SLURM|SLURMD|SBATCH|SUBMITIT)_\w*|LAUNCHER_ATTEMPT|PYTHONSAFEPATH|PYTHONUNBUFFERED|E?UID|PPID|BASHOPTS|SHELLOPTS"
    "|BASH_VERSINFO"
)


def _refuse_number(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(
            "is a number, and YAML reads 24:00:00 as a number too; write D-HH:MM:SS, or HH:MM:SS within quotes in a file"
        )
    return value


Id = Annotated[str, matching(_WORD, "is not a name that Slurm knows; use letters, digits and . _ @ + -")]
Partitions = Annotated[
    str, matching(rf"{_WORD}(,{_WORD})*", "is not a partition; write one name, or several with commas between")
]
Duration = Annotated[
    str,
    BeforeValidator(_refuse_number),
    matching(
        r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}",
        "is not a time that Slurm reads; write minutes, HH:MM:SS or D-HH:MM:SS, such as 2-00:00:00",
    ),
]
Image = Annotated[str, matching(r"[A-Za-z0-9/][\w.:@#+/-]*", "is not an image; write a path or owner/name:tag")]
Mount = Annotated[
    str, matching(rf"{_PATH}:{_PATH}(:[a-z,]+)?", "is not a mount; write /path/on/the/node:/path/inside, or with :ro at the end")
]
Command = Annotated[
    str,
    matching(
        rf"(?!({_RESERVED_WORD})( |$))[A-Za-z0-9_./][\w .,:=+@%/-]*",
        "is more than one plain command; put pipes, variables and the like into a script and write: source /path/of/the/script",
    ),
]
SrunArgument = Annotated[
    str, matching(r"--[a-z][a-z0-9-]*(=[\w.,:/@%+=\[\]-]*)?", "is not an option of srun; write it as in --mpi=none, one each")
]
ParameterName = Annotated[str, matching(r"[a-z][a-z0-9-]*", "is not an option of sbatch; write it without dashes in front")]
ParameterValue = Annotated[
    str,
    BeforeValidator(number_as_text),
    matching(
        r"[\w.,:/@%+=\[\]()&|*?-]*|[\w .,:/@%+=\[\]-]*",
        "is no value of sbatch; use letters, digits and . , : / @ % + = [ ] - with blanks or with ( ) & | * ?",
    ),
]
VariableName = Annotated[
    str,
    matching(r"[A-Za-z_]\w*", "is not the name of a variable; use letters, digits and _, a letter first"),
    matching(
        rf"(?!({_RESERVED_VARIABLE})$).*",
        "is a variable that Slurm, bash or the launcher sets; remove it, or set it in a script and write: "
        "cluster.setup=[source /path/of/the/script]",
    ),
]
VariableValue = Annotated[
    str,
    BeforeValidator(number_as_text),
    matching(
        r"[\w .,:=+@%/^-]*",
        "contains characters that a batch script must not have; set it in a script: cluster.setup=[source /path/of/the/script]",
    ),
]


class SlurmSection(ManagedSection):
    """A Slurm cluster. Settings are named as in sbatch; if unset, the site's defaults apply."""

    kind: Literal["slurm"] = Field("slurm", description="The backend that starts the workers.")
    account: Id | None = Field(None, description="Account to charge.")
    partition: Partitions | None = Field(None, description="Partition, or several separated by commas.")
    time: Duration = Field("1-00:00:00", description="Time limit of one job; a longer run continues in the next job.")
    gpus_per_node: Count | None = Field(
        None, description="GPUs on each node. Unset: all GPUs of a node of the partition; 0 trains on CPUs."
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="CPUs for the ranks of one node. Unset: all CPUs with cluster.exclusive, else the site's default."
    )
    exclusive: Flag = Field(True, description="Use whole nodes, and share them with no other job.")
    requeue: Flag = Field(True, description="Let Slurm run the job again after a lost node or a preemption.")
    signal_lead_seconds: PositiveInt = Field(
        120, description="Seconds before the time limit at which the run saves; must be enough to write a checkpoint."
    )
    setup: tuple[Command, ...] = Field(
        (),
        description=(
            "Commands to run before the launcher starts, such as `module load cuda/12.8`, each one plain command without "
            "variables, pipes or quotes."
        ),
    )
    env: dict[VariableName, VariableValue] = Field(
        default_factory=dict, description="Environment variables of the job, such as NCCL_IB_HCA. Never secrets."
    )
    container_image: Image | None = Field(None, description="Container that the ranks run in. Unset: none.")
    container_runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="Program that starts the container.")
    container_mounts: tuple[Mount, ...] = Field(
        (), description="Folders to mount; the run directory, the caches and a local model are always mounted."
    )
    container_python: Image = Field(
        "python3", description="Python inside the container, with the launcher's dependencies installed."
    )
    srun_args: tuple[SrunArgument, ...] = Field((), description="Additional options for srun.")
    additional_parameters: dict[ParameterName, ParameterValue] = Field(
        default_factory=dict,
        description=(
            "Options for sbatch that have no setting, without dashes: qos, constraint, nodelist, exclude, reservation, "
            "dependency, comment, mem, gres (for sites that require gpu:8 instead of gpus_per_node), switches and so on; use '' "
            "for options without a value. mem is 0, all memory of a node, with cluster.exclusive."
        ),
    )
    exclude_bad_nodes: Flag = Field(False, description="After a node fails its checks, run the job again without it.")

    save_lead_setting: ClassVar[str] = "cluster.signal_lead_seconds"
    gpus_remedy: ClassVar[str] = "ask for them with cluster.gpus_per_node"
    gpu_kind_remedy: ClassVar[str] = "ask for the planned kind with constraint or gres in cluster.additional_parameters"
    memory_remedy: ClassVar[str] = "ask for it with cluster.additional_parameters.mem=0 or cluster.exclusive=true"
    bad_node_remedy: ClassVar[str] = (
        "set cluster.exclude_bad_nodes=true to continue without it, or name it in cluster.additional_parameters.exclude"
    )

    @property
    def uses_own_python(self) -> bool:
        # Without an image, the job runs this Python, which is on storage that the nodes share.
        return self.container_image is None

    @property
    def netrc_problem(self) -> str | None:
        if self.container_image and self.container_runtime == "pyxis":
            return "the W&B login of your netrc may not be seen inside the container"
        return None

    @property
    def save_lead_s(self) -> float:
        return self.signal_lead_seconds

    @property
    def leaves_out_bad_nodes(self) -> bool:
        return self.exclude_bad_nodes

    @property
    def time_minutes(self) -> int:
        """The time limit in whole minutes, rounded up, as Slurm counts it."""
        return minutes(self.time)

    @model_validator(mode="after")
    def _check_parameters(self) -> SlurmSection:
        if self.gpus_per_node and asks_for_gpus(self.additional_parameters.get("gres")):
            raise ValueError("cluster.gpus_per_node and gres in cluster.additional_parameters both ask for GPUs; set one of them")
        if self.time_minutes * 60 <= self.signal_lead_seconds:
            raise ValueError(
                "cluster.signal_lead_seconds leaves no time to train within cluster.time; lower cluster.signal_lead_seconds or "
                "raise cluster.time"
            )
        controlled = [key for key in self.additional_parameters if key in OWN_SBATCH_PARAMETERS]
        if controlled:
            raise ValueError(
                f"cluster.additional_parameters must not set {', '.join(controlled)}; the launcher sets it from another setting"
            )
        return self


def asks_for_gpus(gres: str | None) -> bool:
    """Return whether a gres requests GPUs."""
    return gres is not None and re.search(r"(^|,)gpu(:|,|$)", gres) is not None


def minutes(time: str) -> int:
    """Return the minutes in Slurm's `M`, `M:SS`, `H:MM:SS`, `D-H`, `D-H:MM` or `D-H:MM:SS`, seconds rounded up."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, mins, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return (int(days or 0) * 24 + hours) * 60 + mins + (seconds + 59) // 60
