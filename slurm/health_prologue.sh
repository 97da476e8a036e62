#!/usr/bin/env bash
# Checks a node before a job starts on it. A faulty node is drained with the reason, and the job runs elsewhere.
#
# Set it in slurm.conf as one of:
#   Prolog=/etc/slurm/health_prologue.sh               before each job; add nohold_on_prolog_fail to SchedulerParameters
#   HealthCheckProgram=/etc/slurm/health_prologue.sh   every HealthCheckInterval seconds; slurmd waits for it when it starts
#
# slurmd passes neither a PATH nor your environment. To change the defaults below, name a two-line script in slurm.conf
# instead:
#   export HEALTH_GPUS=8 HEALTH_MOUNTS="/scratch /home"
#   exec /etc/slurm/health_prologue.sh
#
# Exits with 0 if the node is healthy, with 1 after draining it. These are reported on stderr without draining the node:
# - a check whose program is not installed;
# - a shared mount that is full or does not answer, and memory or a local disk that users' files fill, because otherwise
#   one user could get every node drained. These reports also go to syslog, with the user who holds most of the space.
set -u

# Number of GPUs that must answer. Empty: the number in slurm.conf for this node; 0: GPUs are not checked.
gpus=${HEALTH_GPUS:-}
# Xid errors since boot that mean a broken GPU or link. Others (13, 31, 43, 45, 94) are caused by programs. After a
# repair without a reboot, run: dmesg --clear
# https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
fatal_xids=${HEALTH_FATAL_XIDS:-48 62 64 74 79 95 119 120 140}
# Programs that may use a GPU outside of jobs, as a grep -E pattern.
gpu_services=${HEALTH_GPU_SERVICES:-nvidia-cuda-mps|dcgm|nv-hostengine}
# Mount points of run directories and caches, separated by spaces; and how full they may be, in percent.
mounts=${HEALTH_MOUNTS:-}
max_full=${HEALTH_MAX_FULL:-97}
# File system types that are local to this node; all others are shared.
local_types=${HEALTH_LOCAL_TYPES:-ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs ramfs overlay proc sysfs}
# MiB that must be free in /dev/shm, for NCCL and data loaders.
min_shm=${HEALTH_SHM_MIB:-1024}
# The lowest user ID of people; files of lower IDs, such as root's, belong to the machine.
first_user=${HEALTH_FIRST_USER:-1000}
# Time limit of each command in seconds. slurmd kills a HealthCheckProgram after 60 s.
limit=${HEALTH_TIMEOUT_S:-15}
# Seconds that processes of a job that has just ended get to release the GPUs.
patience=${HEALTH_STALE_WAIT_S:-10}

PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
export PATH LC_ALL=C
node=${SLURMD_NODENAME:-$(hostname -s)}
faults=()
output=

fault() { faults+=("$1"); }
# For problems that are not a fault of this node.
report() {
    echo "health of $node: reported, not drained: $1" >&2
    ! has logger || logger -t health_prologue "$node: $1" 2>/dev/null
}
unknown() { echo "health of $node: not checked: $1" >&2; }
has() { command -v "$1" >/dev/null; }

# Runs in a separate process for `bounded`. timeout(1) waits even for a child that SIGKILL cannot end, such as one in a
# hung GPU driver. So the reader stops waiting by itself; the child it leaves behind holds no file that slurmd reads.
in_time() {
    exec 2>/dev/null </dev/null
    timeout -k 1 "$limit" "$@" 2>&1
    printf '\n%s\0' "$?"
}

# bounded COMMAND...: stores the command's output in $output and returns its status, or 124 if it did not end in time.
bounded() {
    local status
    output=
    if IFS= read -r -d '' -t "$((limit + 3))" output < <(in_time "$@"); then
        status=${output##*$'\n'}
        output=${output%$'\n'*}
        output=${output%$'\n'}
        # 137: timeout had to send SIGKILL.
        [[ "$status" -eq 137 ]] && status=124
        return "$status"
    fi
    return 124
}

# failed NAME STATUS [report]: records a failed command as a fault, or with `report` as a report.
failed() {
    if [[ "$2" -eq 124 ]]; then
        "${3:-fault}" "$1 does not answer within $limit s"
    else
        "${3:-fault}" "$1 fails: $(head -n 1 <<<"$output" | tr -cd '[:alnum:] ._:/-' | cut -c 1-120)"
    fi
}

expected_gpus() {
    [[ -n "$gpus" ]] && return
    gpus=0
    if bounded scontrol show node "$node"; then
        gpus=$(grep -oE '^ *Gres=.*' <<<"$output" | grep -oE 'gpu(:[A-Za-z][^:,( ]*)?:[0-9]+' | awk -F: '{n += $NF} END {print n + 0}')
    else
        unknown "number of GPUs (scontrol does not answer)"
    fi
}

check_gpus() {
    local found ecc
    bounded nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits ||
        { failed nvidia-smi "$?"; return 1; }
    found=$(grep -cE '^ *[0-9]+ *,' <<<"$output")
    [[ "$found" -ge "$gpus" ]] || fault "$found of $gpus GPUs answer"
    ecc=$(awk -F', *' '$2 ~ /^[0-9]+$/ && $2 > 0 {printf "%s%s", sep, $1; sep = ","}' <<<"$output")
    [[ -z "$ecc" ]] || fault "uncorrectable ECC errors on GPU $ecc"
}

# Users choose the process and file names in other lines of the log, so the driver's name must start the line, after the
# time.
xid_line='^(\[[^]]*\] *){0,2}NVRM: Xid \(PCI:[0-9a-fA-F:.]+( GPU-I:[0-9]+)?\): [0-9]+,'

check_kernel_log() {
    local code seen=
    has dmesg || { unknown "Xid errors (no dmesg)"; return; }
    bounded dmesg || { unknown "Xid errors (dmesg: $output)"; return; }
    while read -r code; do
        [[ " $fatal_xids " != *" $code "* ]] || seen="$seen $code"
    done < <(grep -aoE "$xid_line" <<<"$output" | grep -aoE '[0-9]+,$' | tr -d , | sort -un)
    [[ -z "$seen" ]] || fault "Xid$seen in the kernel log"
}

# Stores in $stale the IDs of processes that use a GPU and belong to no job on this node.
stale_processes() {
    local in_jobs used services
    bounded nvidia-smi --query-compute-apps=pid --format=csv,noheader || { failed nvidia-smi "$?"; return 1; }
    used=$(grep -E '^ *[0-9]+' <<<"$output" | cut -d, -f1 | tr -d ' ')
    stale=
    [[ -n "$used" ]] || return 0
    # Users choose their programs' names, which may contain line breaks: only lines that start with a process ID count.
    bounded nvidia-smi --query-compute-apps=pid,process_name --format=csv,noheader || { failed nvidia-smi "$?"; return 1; }
    services=$(grep -E '^ *[0-9]+ *,' <<<"$output" | grep -E "$gpu_services" | cut -d, -f1 | tr -d ' ')
    used=$(grep -vxF -e "${services:-none}" <<<"$used")
    [[ -n "$used" ]] || return 0
    if ! bounded scontrol listpids && [[ $output != *"No job steps"* ]]; then
        unknown "processes that use GPUs (scontrol listpids: $output)"
        return 0
    fi
    in_jobs=$(awk '$1 ~ /^[0-9]+$/ {print $1}' <<<"$output")
    stale=$(grep -vxF -e "${in_jobs:-none}" <<<"$used" | tr '\n' ' ')
    stale=${stale% }
}

check_stale() {
    local stale end=$((SECONDS + patience))
    while stale_processes && [[ -n "$stale" ]]; do
        if [[ "$SECONDS" -ge "$end" ]]; then
            fault "processes of no job use a GPU: $stale"
            return
        fi
        sleep 1
    done
}

# Stores in $machine_mib the MiB of the machine's files below $1, and in $holder who holds most of the rest. Files that
# users have deleted but keep open have no name there, so all space counts as theirs unless it is the machine's. Returns 1
# if there are too many files to count.
count_owners() {
    local user user_mib
    bounded sh -c 'find "$1" -xdev -printf "%U %b\n" 2>/dev/null | awk -v first="$2" "
        \$1 < first {machine += \$2; next} {by[\$1] += \$2}
        END {for (u in by) if (by[u] > most) {most = by[u]; top = u}; printf \"%d %d %d\", machine / 2048, top, most / 2048}"' \
        sh "$1" "$first_user" || { holder="too many files to tell whose"; return 1; }
    read -r machine_mib user user_mib <<<"$output"
    holder="user $user holds $user_mib MiB"
    [[ "$user" -ne 0 ]] || holder="no file of a user has a name there"
    [[ "$user" -eq 0 || "$user" != "${SLURM_JOB_UID:-}" ]] || holder="the user of this job, $user, holds $user_mib MiB"
}

check_mount() {
    local path=$1 type options total full machine_mib holder tell=report
    # Read the kernel's table: accessing the mount point would wait for its server. The last mount hides earlier ones.
    if ! bounded findmnt --kernel --raw --noheadings --output TARGET,FSTYPE,OPTIONS; then
        failed findmnt "$?"
        return
    fi
    read -r type options < <(awk -v path="$path" '$1 == path {last = $2 " " $3} END {print last}' <<<"$output")
    [[ -n "$type" ]] || { fault "$path is not mounted"; return; }
    case ",$options," in *,ro,*) fault "$path is mounted read-only" ;; esac
    [[ " $local_types " != *" $type "* ]] || tell=fault
    bounded df -Pm "$path" || { failed "$path" "$?" "$tell"; return; }
    read -r total full < <(awk 'END {sub("%", "", $5); print $2 + 0, $5 + 0}' <<<"$output")
    [[ "$full" -gt "$max_full" ]] || return
    if [[ "$tell" = report ]]; then
        report "$path is $full% full"
    elif count_owners "$path" && [[ $((100 * machine_mib)) -gt $((max_full * total)) ]]; then
        fault "$path is $full% full"
    else
        report "$path is $full% full: $holder"
    fi
}

check_shm() {
    local total free lack machine_mib holder
    bounded df -Pm /dev/shm || { failed /dev/shm "$?"; return; }
    read -r total free < <(awk 'END {print $2 + 0, $4 + 0}' <<<"$output")
    [[ "$free" -lt "$min_shm" ]] || return
    lack="/dev/shm has $free MiB free of the $min_shm it should"
    if [[ "$total" -lt "$min_shm" ]]; then
        fault "$lack"
    elif count_owners /dev/shm && [[ $((total - machine_mib)) -lt "$min_shm" ]]; then
        fault "$lack"
    else
        report "$lack: $holder"
    fi
}

check_clock() {
    if has timedatectl && bounded timedatectl show --property=NTPSynchronized --value && [[ $output =~ ^(yes|no)$ ]]; then
        [[ "$output" = yes ]] || fault "the clock is not synchronized"
    elif has chronyc && bounded chronyc -n tracking; then
        grep -qE '^Leap status *: *Normal' <<<"$output" || fault "the clock is not synchronized"
    else
        unknown "clock (neither timedatectl nor chronyc answers)"
    fi
}

expected_gpus
if [[ "$gpus" -gt 0 ]]; then
    check_gpus && check_stale
    check_kernel_log
fi
for path in $mounts; do
    check_mount "$path"
done
check_shm
check_clock

[[ "${#faults[@]}" -eq 0 ]] && exit 0
reason=$(printf '; %s' "${faults[@]}")
reason="health: ${reason:2}"
echo "health of $node: ${reason:8}" >&2
bounded scontrol update NodeName="$node" State=DRAIN Reason="$reason" || echo "health of $node: cannot drain it: $output" >&2
exit 1
