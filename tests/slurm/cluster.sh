#!/usr/bin/env bash
# A real SLURM cluster of a few nodes on this one machine, for the time of one command.
#
# Everything lives in namespaces of this script's own: the head has a network, mount, process and host name namespace,
# and every node has a set of its own below it, with its own /tmp, /dev/shm and process numbers. So MPI sees separate
# hosts, two clusters do not meet, and when this script ends, however it ends, the kernel ends every process, unmounts
# all and removes the links. All files are on a tmpfs that only the cluster sees: nothing is left behind.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/slurm/cluster.sh [--nodes N] [--rate RATE] [--] COMMAND [ARGUMENT ...]

Starts a SLURM controller and N nodes (default 2), runs COMMAND on the controller's host, where sbatch, srun and their
kin work as on any cluster, and takes everything down again. The exit status is COMMAND's.

  --nodes N     how many nodes, n1 ... nN
  --rate RATE   shapes each node's link, such as 1gbit (tc's tbf; default: as fast as the kernel is)
  --missing     print what the machine lacks for it, and nothing else; the exit status is 0 if it lacks nothing

Needs root and Debian's slurmctld, slurmd, slurm-client, munge, libpmix-dev and iproute2. The nodes share the kernel, the
cores and the file system, except for /tmp and /dev/shm; of these they see the current folder and $VIRTUAL_ENV all the
same, should they lie there. Partitions: `batch` (default; its jobs give way) and `urgent`.
TEXT
}

nodes=2 rate='' inside='' missing_only=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --nodes | --rate)
            [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
            case $1 in --nodes) nodes=$2 ;; --rate) rate=$2 ;; esac
            shift 2 ;;
        --missing) missing_only=yes; shift ;;
        --inside) inside=yes; shift ;; # this script, started again in its namespaces
        --) shift; break ;;
        -*) echo "unknown argument: $1; see --help" >&2; exit 2 ;;
        *) break ;;
    esac
done

# ---------------------------------------------------------------------------------------------- outside the namespaces
if [ -z "$inside" ]; then
    missing=()
    [ "$(id -u)" -eq 0 ] || missing+=("root")
    for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge mungekey:munge ip:iproute2 \
        unshare:util-linux; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" > /dev/null || missing+=("${pair##*:}")
    done
    # srun's plugin asks for the name that only the -dev package has.
    [[ $(ldconfig -p) == *'libpmix.so '* ]] || missing+=(libpmix-dev)
    if [ -n "$missing_only" ]; then echo "${missing[*]}"; [ ${#missing[@]} -eq 0 ]; exit; fi
    [ ${#missing[@]} -eq 0 ] || { echo "a SLURM cluster needs what this machine lacks: ${missing[*]}" >&2; exit 1; }
    [ $# -gt 0 ] || { usage >&2; exit 2; }
    # Should this script be killed, the kernel ends unshare, and then the first process of the namespaces and all others.
    setpriv --pdeathsig KILL unshare --mount --pid --net --uts --ipc --fork --kill-child --mount-proc \
        --propagation private "$0" --inside --nodes "$nodes" --rate "$rate" -- "$@" <&0 &
    child=$!
    trap 'kill -KILL "$child" 2> /dev/null; exit 130' INT TERM HUP
    status=0
    wait "$child" || status=$?
    exit "$status"
fi

# ---------------------------------------------------------------------------------------------------------- on the head
export PATH=$PATH:/usr/sbin:/sbin
lab=/etc/slurm # the packages made it; what stands there is hidden, from this cluster only
mount -t tmpfs -o mode=755 tmpfs "$lab"
export SLURM_CONF=$lab/slurm.conf
failed() { # what, and the end of the logs
    echo "cluster: $1" >&2
    tail -n 15 "$lab"/*.log >&2
    exit 1
}

hostname mpidl-head
ip link set lo up
ip link add bridge type bridge
ip addr add 10.77.1.254/24 dev bridge
ip link set bridge up
cp /etc/hosts "$lab/hosts"
echo "10.77.1.254 mpidl-head" >> "$lab/hosts"

# Many CPUs are pretended, so that any job starts at once. `batch` gives way to `urgent`: its jobs get SIGTERM, GraceTime
# seconds to end, and are put back into the queue. A job that was put back waits for cred_expire.
cat > "$SLURM_CONF" <<CONF
ClusterName=mpidl
SlurmctldHost=mpidl-head(10.77.1.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$lab/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool.%n
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd.%n.pid
SlurmctldLogFile=$lab/slurmctld.log
SlurmdLogFile=$lab/slurmd.%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs=16 RealMemory=4000 State=UNKNOWN
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=batch Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
CONF
for i in $(seq "$nodes"); do
    echo "10.77.1.$i mpidl-n$i" >> "$lab/hosts"
    echo "NodeName=mpidl-n$i NodeAddr=10.77.1.$i" >> "$SLURM_CONF"
    mkdir "$lab/spool.mpidl-n$i"
done
mount --bind "$lab/hosts" /etc/hosts

mkdir "$lab/state"
mungekey --create --keyfile="$lab/munge.key"
munged --key-file="$lab/munge.key" --socket="$lab/munge.socket" --pid-file="$lab/munged.pid" \
    --log-file="$lab/munged.log" --seed-file="$lab/munged.seed" || failed "munged does not start"
slurmctld -c || failed "slurmctld does not start"

# What would vanish behind a node's own /tmp and /dev/shm, kept reachable here.
shared=0
for folder in "$PWD" ${VIRTUAL_ENV:+"$VIRTUAL_ENV"}; do
    case $folder in
        /tmp/* | /dev/shm/*)
            shared=$((shared + 1))
            mkdir "$lab/shared.$shared"
            mount --rbind "$folder" "$lab/shared.$shared"
            echo "$folder" > "$lab/shared.$shared.path" ;;
    esac
done

# -------------------------------------------------------------------------------------------------------- on each node
# The shell stays as the first process of the node, to reap what jobs leave behind.
# shellcheck disable=SC2016 # expanded there
node='hostname "$1"
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    for path in "$4"/shared.*.path; do
        [ -e "$path" ] || continue
        mkdir -p "$(cat "$path")"
        mount --rbind "${path%.path}" "$(cat "$path")"
    done
    ip link set lo up
    until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
    ip addr add "$2/24" dev eth0
    [ -z "$3" ] || tc qdisc add dev eth0 root tbf rate "$3" burst 256kb latency 100ms
    ip link set eth0 up
    slurmd -D -N "$1"
    exit # so that the line above is not the last, which the shell would become'
for i in $(seq "$nodes"); do
    unshare --mount --pid --net --uts --ipc --fork --mount-proc --propagation private \
        bash -c "$node" node "mpidl-n$i" "10.77.1.$i" "$rate" "$lab" < /dev/null > "$lab/node.$i.log" 2>&1 &
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
    ip link add "port$i" type veth peer name eth0 netns "$!"
    [ -z "$rate" ] || tc qdisc add dev "port$i" root tbf rate "$rate" burst 256kb latency 100ms
    ip link set "port$i" master bridge up
done

for _ in $(seq 300); do
    [ "$(sinfo -h -p batch -t idle -o %D 2> /dev/null)" != "$nodes" ] || break
    sleep 0.1
done
[ "$(sinfo -h -p batch -t idle -o %D)" = "$nodes" ] || failed "not every node came up: $(sinfo -h -p batch)"

status=0
MPIDL_TESTS_CLUSTER=$nodes "$@" || status=$?
exit "$status"
