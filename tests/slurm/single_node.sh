#!/bin/bash
# A SLURM of this machine alone, for tests; as root.   tests/slurm/single_node.sh start|stop
# Exit code 3: it cannot be started here, for the reason that is printed.
# The configuration must be /etc/slurm/slurm.conf: Snakemake's plugin clears SLURM_CONF from the environment of its jobs.
set -euo pipefail
STATE=/tmp/hdkd-slurm
MARK="# written by tests/slurm/single_node.sh"

start() {
    for program in slurmctld slurmd sbatch munged; do
        if ! command -v $program > /dev/null; then
            echo "no $program: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" >&2
            exit 3
        fi
    done
    if [ "$(id -u)" != 0 ]; then
        echo "a SLURM can be started by root only" >&2
        exit 3
    fi
    if [ -e /etc/slurm/slurm.conf ] && ! grep -q "^$MARK" /etc/slurm/slurm.conf; then
        echo "/etc/slurm/slurm.conf is another cluster's; it is left as it is" >&2
        exit 3
    fi
    stop
    mkdir -p $STATE /etc/slurm
    [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
    mkdir -p /run/munge /var/log/munge /var/lib/munge
    chown munge: /etc/munge/munge.key /run/munge /var/log/munge /var/lib/munge
    chmod 400 /etc/munge/munge.key
    if ! munge --no-input > /dev/null 2>&1; then
        setpriv --reuid=munge --regid=munge --clear-groups munged
        ln -s /run/munge/munged.pid $STATE/munged.pid
    fi
    local host cpus memory
    host=$(hostname -s)
    cpus=$(nproc)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat > /etc/slurm/slurm.conf << END
$MARK
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$STATE/state
SlurmdSpoolDir=$STATE/spool
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=5
UnkillableStepTimeout=300
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
    slurmctld
    slurmd
    for _ in $(seq 60); do
        if sinfo --noheader --format=%T 2> /dev/null | grep -q idle; then
            sinfo
            exit 0
        fi
        sleep 0.5
    done
    echo "SLURM did not start; see $STATE/slurmctld.log and $STATE/slurmd.log" >&2
    exit 1
}

stop() {
    if [ -e $STATE/slurmctld.pid ]; then
        timeout 10 scancel --user=root || true
        for _ in $(seq 40); do
            [ -n "$(timeout 10 squeue --noheader 2> /dev/null)" ] || break
            sleep 0.5
        done
    fi
    for daemon in slurmd slurmctld munged; do
        if [ -e $STATE/$daemon.pid ]; then
            kill "$(cat $STATE/$daemon.pid)" 2> /dev/null || true
            for _ in $(seq 40); do
                [ -e $STATE/$daemon.pid ] || break
                sleep 0.25
            done
        fi
    done
    rm -rf $STATE
    if grep -qs "^$MARK" /etc/slurm/slurm.conf; then rm /etc/slurm/slurm.conf; fi
}

case "${1:-}" in
    start | stop) "$1" ;;
    *) sed -n '2,4p' "$0" >&2 && exit 2 ;;
esac
