#!/usr/bin/env bash
# Checks a node before a job starts on it; a node with a fault is drained with the reason, and the job goes elsewhere.
#
# In slurm.conf, as one of:
#   Prolog=/etc/slurm/health_prologue.sh               before each job; add nohold_on_prolog_fail to SchedulerParameters
#   HealthCheckProgram=/etc/slurm/health_prologue.sh   every HealthCheckInterval seconds; slurmd waits for it when it starts
#
# slurmd gives it neither a PATH nor an environment of yours. What differs from the defaults below belongs into a script
# of two lines that slurm.conf names instead:
#   export HEALTH_GPUS=8 HEALTH_MOUNTS="/scratch /home"
#   exec /etc/slurm/health_prologue.sh
#
# Exits 0 where the node is healthy, 1 after it was drained. What cannot be judged, because its program is not
# installed, is named on stderr and drains nothing. So is a shared mount that is full or does not answer, and memory or a
# disk of the node that the files of users fill: one user can do that, and every node would be drained. Reports also go to
# syslog, with the user who holds most of the space.
set -u

# GPUs that must answer. Empty: as many as slurm.conf says of this node; 0: no GPU is looked at.
gpus=${HEALTH_GPUS:-}
# Xid errors since the machine started that mean a broken GPU or link. Others (13, 31, 43, 45, 94) are the faults of
# programs. After a repair without a reboot: dmesg --clear.
# https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
fatal_xids=${HEALTH_FATAL_XIDS:-48 62 64 74 79 95 119 120 140}
# Programs that may use a GPU outside of jobs, as a pattern of grep -E.
gpu_services=${HEALTH_GPU_SERVICES:-nvidia-cuda-mps|dcgm|nv-hostengine}
# Mount points of run directories and caches, with blanks between; and how full they may be, in percent.
mounts=${HEALTH_MOUNTS:-}
max_full=${HEALTH_MAX_FULL:-97}
# File systems of this node alone; all others are shared.
local_types=${HEALTH_LOCAL_TYPES:-ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs ramfs overlay proc sysfs}
# Free MiB in /dev/shm: NCCL and data loaders need it.
min_shm=${HEALTH_SHM_MIB:-1024}
# The first user id of people; files of smaller ones, such as root, are the machine's.
first_user=${HEALTH_FIRST_USER:-1000}
# Seconds for each command. slurmd kills a HealthCheckProgram after 60 s.
limit=${HEALTH_TIMEOUT_S:-15}
# Seconds for the processes of a job that has just ended to let go of the GPUs.
patience=${HEALTH_STALE_WAIT_S:-10}

PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
export PATH LC_ALL=C
node=${SLURMD_NODENAME:-$(hostname -s)}
faults=()
output=

fault() { faults+=("$1"); }
# Of what is no fault of this node.
report() {
    echo "health of $node: reported, not drained: $1" >&2
    ! has logger || logger -t health_prologue "$node: $1" 2>/dev/null
}
unknown() { echo "health of $node: not checked: $1" >&2; }
has() { command -v "$1" >/dev/null; }

# For bounded, in a process of its own. timeout(1) would wait for a child that even SIGKILL does not end, and a hung GPU
# driver leaves just that: so the reader gives up by itself, and what it leaves behind holds no file that slurmd reads.
in_time() {
    exec 2>/dev/null </dev/null
    timeout -k 1 "$limit" "$@" 2>&1
    printf '\n%s\0' "$?"
}

# bounded COMMAND...: what it prints goes to $output; returns its status, 124 where it did not end in time.
bounded() {
    local status
    output=
    if IFS= read -r -d '' -t "$((limit + 3))" output < <(in_time "$@"); then
        status=${output##*$'\n'}
        output=${output%$'\n'*}
        output=${output%$'\n'}
        # 137: timeout had to use SIGKILL.
        [[ "$status" -eq 137 ]] && status=124
        return "$status"
    fi
    return 124
}

# failed NAME STATUS [report]: what to say of a command that did not work; a fault, or a report.
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

# Names of processes and files in other lines of the log are chosen by users: the driver's name begins the line, after
# the time.
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

# The ids of processes that use a GPU and belong to no job of this node go to $stale.
stale_processes() {
    local in_jobs used services
    bounded nvidia-smi --query-compute-apps=pid --format=csv,noheader || { failed nvidia-smi "$?"; return 1; }
    used=$(grep -E '^ *[0-9]+' <<<"$output" | cut -d, -f1 | tr -d ' ')
    stale=
    [[ -n "$used" ]] || return 0
    # Users choose the names of their programs, also with line breaks: a line with a name alone makes no process.
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

# The MiB of files of the machine below $1 go to $machine_mib, and who holds most of the rest to $holder. What users have
# deleted and keep open has no name there, so space counts as theirs unless it is the machine's. Returns 1 where there are
# too many files to count.
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
    # The kernel's table, since a look at a mount point waits for its server. The last mount covers those before it.
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
