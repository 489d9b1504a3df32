#!/usr/bin/env bash
# The tests on a two-node SLURM cluster, for MPICH and for Open MPI: tests/slurm/cluster.sh brings the cluster up on this
# machine and takes it down. Nothing is installed here; it fails if a test was skipped.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/slurm/run.sh [--only mpich|openmpi] [--environments DIR] [-- PYTEST ARGUMENTS]
       tests/slurm/run.sh --packages

Runs the tests marked `slurm` in DIR/.venv-mpich and DIR/.venv-openmpi (DIR: the top of the checkout), which
tests/run.sh makes. Needs root and Debian's packages that --packages lists.
TEXT
}

mpis=(mpich openmpi)
environments=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --packages) echo slurmctld slurmd slurm-client munge libpmix-dev iproute2 util-linux; exit 0 ;;
        --only | --environments)
            [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
            case $1=$2 in
                --only=mpich | --only=openmpi) mpis=("$2") ;;
                --only=*) echo "--only takes mpich or openmpi, found $2" >&2; exit 2 ;;
                *) environments=$(realpath -m "$2") ;;
            esac
            shift 2 ;;
        --) shift; break ;;
        *) echo "unknown argument: $1; see --help" >&2; exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
environments=${environments:-$PWD}

lacking=$(tests/slurm/cluster.sh --missing) || {
    echo "tests/slurm/run.sh: this machine lacks: $lacking. As root: apt-get install -y $(tests/slurm/run.sh --packages)" >&2
    exit 1
}
folder=$(mktemp -d)
groups=()
# shellcheck disable=SC2317 # the trap calls it
ended() {
    local group
    for group in "${groups[@]}"; do kill -INT -- "-$group" 2> /dev/null || true; done
    for group in "${groups[@]}"; do wait "$group" 2> /dev/null || true; done # the clusters come down
    rm -rf "$folder"
}
trap ended EXIT
trap 'exit 130' INT TERM

on_two_nodes() { # mpi, pytest's arguments
    local mpi=$1 totals=$folder/$1.totals passed failed skipped status=0
    shift
    printf '\n== %s on two nodes\n' "$mpi"
    "$environments/.venv-$mpi/bin/pytest" -m slurm tests/slurm --totals="$totals" "$@" < /dev/null || status=1
    read -r passed failed skipped 2> /dev/null < "$totals" || { passed=0 failed=1 skipped=0; }
    echo "$mpi on two nodes: $passed passed, $failed failed, $skipped skipped"
    # A test that was skipped here has shown nothing: this machine has all that they need.
    [ "$passed" -gt 0 ] && [ "$failed" -eq 0 ] && [ "$skipped" -eq 0 ] || status=1
    return "$status"
}

# Jobs wait for SLURM more than they compute: both MPIs at the same time, each on a cluster of its own.
set -m # each in a process group of its own, which `ended` can end
for mpi in "${mpis[@]}"; do
    on_two_nodes "$mpi" "$@" > "$folder/$mpi.log" 2>&1 & groups+=($!)
done
set +m
status=0
for i in "${!mpis[@]}"; do
    wait "${groups[i]}" || status=1
    cat "$folder/${mpis[i]}.log"
done
groups=()
exit "$status"
