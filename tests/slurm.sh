#!/usr/bin/env bash
# A real Slurm of one node for tests: `slurm.sh start FOLDER` and `slurm.sh stop FOLDER`.
# All its files are in FOLDER, stop ends every process that start has started, and several clusters can run at once.
# start prints an export command that sets SLURM_CONF, by which Slurm's commands find the cluster.
set -euo pipefail

fail() { echo "slurm.sh: $*" >&2; exit 1; }

usage="usage: slurm.sh start FOLDER, or slurm.sh stop FOLDER"
[ $# = 2 ] || fail "$usage"
[ "$(id -u)" = 0 ] || fail "Slurm's daemons have to be started by root"
PATH=$PATH:/usr/sbin:/sbin  # Debian installs daemons there, and not every PATH includes it
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" > /dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
done

# Repeat a command until it succeeds; return false if it has not succeeded after $1 seconds.
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
# The program of a process, without the suffix -wlm of Debian; empty if the process has ended, even if it is a zombie.
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
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # nproc would obey these variables
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
# Processes left over from a cancelled job are killed after this many seconds.
KillWait=5
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory
PartitionName=debug Nodes=$node Default=YES State=UP
CONF
    # Without --force, munged would not start, because other users cannot reach a socket in this folder.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2> "$folder/munged.err" \
        || fail "munged does not start: $(tail -n 1 "$folder/munged.err")"
    # In the background rather than as daemons: otherwise errors before they open their logs would be lost.
    slurmctld -D > "$folder/slurmctld.out" 2>&1 &
    slurmd -D -N "$node" > "$folder/slurmd.out" 2>&1 &
    within 30 is_idle || fail "the node is not idle after 30 seconds: $(sinfo 2>&1 | tail -n 1)"
    is_up=yes
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local daemon pid file
    if [ -e "$folder/slurmctld.pid" ] && squeue > /dev/null 2>&1; then
        scancel --state=PENDING --quiet --user=root || true  # first, or pending jobs would start when running ones end
        scancel --quiet --user=root || true
        within 30 has_no_jobs || true
    fi
    # Kill the job processes that Slurm has lost track of: they ignored SIGTERM, and their parents have ended.
    for file in $(grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2> /dev/null || true); do
        if grep -qz '^SLURM_JOB_ID=' "$file" 2> /dev/null; then
            kill -9 "$(basename "$(dirname "$file")")" 2> /dev/null || true
        fi
    done
    for daemon in slurmd slurmctld munged; do
        file=$folder/$daemon.pid
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # Do not kill another program that has been given the same process id since.
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
