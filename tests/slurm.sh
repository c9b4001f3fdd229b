#!/usr/bin/env bash
# A real Slurm of one node for tests: `slurm.sh start FOLDER` and `slurm.sh stop FOLDER`.
# All that it writes lies in FOLDER, all that it starts ends with stop, and several can run beside each other.
# start prints what to export; Slurm's commands find the cluster by it.
set -euo pipefail

fail() { echo "slurm.sh: $*" >&2; exit 1; }

usage="usage: slurm.sh start FOLDER, or slurm.sh stop FOLDER"
[ $# = 2 ] || fail "$usage"
[ "$(id -u)" = 0 ] || fail "Slurm's daemons have to be started by root"
PATH=$PATH:/usr/sbin:/sbin  # where Debian keeps daemons, and where the PATH of a shell does not always look
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" > /dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
done

# True as soon as a command succeeds, false if it has not after so many seconds.
within() {
    local end=$((SECONDS + $1)); shift
    until "$@" 2> /dev/null; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}

free_port() {
    local port
    while port=$((20000 + RANDOM % 10000)); (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do :; done
    echo "$port"
}

is_idle() { [ "$(sinfo --noheader --format=%t)" = idle ]; }
has_no_jobs() { [ "$(squeue --noheader | wc -l)" = 0 ]; }
# The program of a process, without the -wlm that Debian gives its name; nothing where it has ended, be it a zombie.
program_of() { local file; file=$(readlink "/proc/$1/exe") && basename "${file%-wlm}"; }
is_over() { ! program_of "$1" > /dev/null; }

start() {
    umask 077
    mkdir "$folder" 2> /dev/null || fail "$folder cannot be made: name a folder that is not there yet"
    mkdir "$folder/state" "$folder/spool"
    head -c 1024 /dev/urandom > "$folder/munge.key"
    is_up=
    trap '[ "$is_up" ] || { stop; echo "slurm.sh: Slurm did not start; its logs are in $folder" >&2; }' EXIT

    local node cores memory ctld_port node_port
    node=$(hostname -s)
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # which it would believe
    memory=$(awk '/^MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    ctld_port=$(free_port)
    node_port=$(free_port)
    cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$node_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
# What is left of a cancelled job is killed after this many seconds.
KillWait=5
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory
PartitionName=debug Nodes=$node Default=YES State=UP
CONF
    # The folder is closed to everybody else, and munged warns that so nobody else can reach its socket: --force.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2> "$folder/munged.err" \
        || fail "munged does not start: $(tail -n 1 "$folder/munged.err")"
    # In the background rather than as daemons: only so is what they complain about before they have a log kept.
    slurmctld -D > "$folder/slurmctld.out" 2>&1 &
    slurmd -D -N "$node" > "$folder/slurmd.out" 2>&1 &
    within 30 is_idle || fail "the node is not idle after 30 seconds: $(sinfo 2>&1 | tail -n 1)"
    is_up=yes
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local daemon pid file
    if [ -e "$folder/slurmctld.pid" ] && squeue > /dev/null 2>&1; then
        scancel --state=PENDING --quiet --user=root || true  # first, or they would start when the others end
        scancel --quiet --user=root || true
        within 30 has_no_jobs || true
    fi
    # The processes of jobs that Slurm has lost sight of: those that ignored SIGTERM and whose parents have ended.
    for file in $(grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2> /dev/null || true); do
        if grep -qz '^SLURM_JOB_ID=' "$file" 2> /dev/null; then
            kill -9 "$(basename "$(dirname "$file")")" 2> /dev/null || true
        fi
    done
    for daemon in slurmd slurmctld munged; do
        file=$folder/$daemon.pid
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # A number that has gone to another program since is left alone.
        if [ "$(program_of "$pid" || true)" = "$daemon" ]; then
            kill "$pid"
            within 15 is_over "$pid" || kill -9 "$pid" 2> /dev/null || true
        fi
        rm -f "$file"
    done
}

folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
case $1 in
    start) start ;;
    stop) stop ;;
    *) fail "$usage" ;;
esac
