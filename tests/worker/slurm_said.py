"""Output of Slurm 24.11.5 with SLURM_TIME_FORMAT=%s, recorded on the testbed and shortened."""

from __future__ import annotations

import json

# An excerpt of `scontrol show config`.
CONFIG = """\
Configuration data as of 1795553498
AccountingStorageEnforce = associations,limits,qos
ClusterName             = testbed
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
"""

_PARTITION = """\
PartitionName={name}
   AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL
   AllocNodes=ALL Default={default} QoS=N/A
   DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO ExclusiveTopo=NO GraceTime=10 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED
   Nodes=n[1-3]
   PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode={preempt}
   State=UP TotalCPUs=12 TotalNodes=3 SelectTypeParameters=NONE
   JobDefaults=(null)
   DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
   TRES=cpu=12,mem=12000M,node=3,billing=12

"""
UNKNOWN_JOB = "slurm_load_jobs error: Invalid job id specified"
REQUEUE_DISABLED = "Requested operation is presently disabled for job 41"
NOT_AVAILABLE = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
NO_JSON = "scontrol: error: Couldn't find the specified plugin name for serializer/json looking at all files"
UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"

_NODE = (
    "NodeName={name} Arch=x86_64 CoresPerSocket=1  CPUAlloc=1 CPUEfctv=4 CPUTot=4 CPULoad=1.51 "
    "AvailableFeatures=(null) ActiveFeatures=(null) Gres=(null) NodeAddr={address} NodeHostName={name} Port=16982 "
    "Version=24.11.5 OS=Linux 6.18.44-fc-v657 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=4000 AllocMem=100 "
    "FreeMem=22492 Sockets=4 Boards=1 State={state} ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A "
    "Partitions=main,high,short  BootTime={booted} SlurmdStartTime=1795552364 LastBusyTime=1795553494 "
    "ResumeAfterTime=None CfgTRES=cpu=4,mem=4000M,billing=4 AllocTRES=cpu=1,mem=100M CurrentWatts=0 AveWatts=0 \n"
)
_JOB = """\
JobId=41 JobName=tried
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=1 Nice=0 Account=research QOS=normal
   JobState={state} Reason={reason} Dependency=(null)
   Requeue={requeue} Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit={limit} TimeMin=N/A
   SubmitTime=1795553497 EligibleTime=1795553497
   AccrueTime=1795553497
   StartTime={begins} EndTime={ends} Deadline=N/A
   PreemptEligibleTime=1795553498 PreemptTime={preempted}
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=1795553498 Scheduler=Main
   Partition={partition} AllocNode:Sid=login:5472
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1-2]
   BatchHost=n1
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   ReqTRES=cpu=2,mem=200M,node=2,billing=2
   AllocTRES=cpu=2,mem=200M,node=2,billing=2
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   MinCPUsNode=1 MinMemoryCPU=100M MinTmpDiskNode=0
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=(null)
   WorkDir=/srv/project/runs/tried
   StdErr=/dev/null
   StdIn=/dev/null
   StdOut=/dev/null

"""


def partition(name: str) -> str:
    """`scontrol show partition NAME`: jobs of `main` are preempted by requeue, jobs of `high` are not preempted."""
    return _PARTITION.format(name=name, default="YES" if name == "main" else "NO", preempt={"main": "REQUEUE"}.get(name, "OFF"))


def node(name: str, address: str, state: str = "MIXED", booted: int = 1795535983) -> str:
    """A line of `scontrol --oneliner show node`."""
    return _NODE.format(name=name, address=address, state=state, booted=booted)


def job(
    *,
    begins: str = "1795553498",
    ends: str = "1795554098",
    limit: str = "00:10:00",
    preempted: str = "None",
    requeue: int = 1,
    partition: str = "main",
    state: str = "RUNNING",
    reason: str = "None",
    restarts: int = 0,
) -> str:
    """`scontrol show job 41` while it runs; `preempted` is the time at which Slurm began to preempt it."""
    return _JOB.format(
        begins=begins,
        ends=ends,
        limit=limit,
        preempted=preempted,
        requeue=requeue,
        partition=partition,
        state=state,
        reason=reason,
        restarts=restarts,
    )


def job_json(*states: str) -> str:
    """The part of `scontrol show job 41 --json` that the text output lacks: ("PENDING", "COMPLETING") after a requeue."""
    return json.dumps({"jobs": [{"job_id": 41, "name": "tried", "job_state": states}]})


def squeue(number: str, state: str, name: str = "tried") -> str:
    """A line of `squeue` with the columns that the launcher requests."""
    return "\x1f".join((number, name, state, "None", "1795553498", "1795554098", "0", "n[1-2]", "0:0", "\n"))


def sacct(number: str, state: str, name: str = "tried") -> str:
    """A line of `sacct` with the columns that the launcher requests."""
    return "\x1f".join((number, name, state, "None", "1795553494", "n[1-2]", "0:0", "1795553492")) + "\n"
