# shellcheck shell=bash
# What the .sbatch files share: how ranks are started, and what becomes of a job that was stopped. Sites edit site.sh only.

set -euo pipefail
# shellcheck source=jobs/site.sh
source jobs/site.sh

# srun does not take this over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Not from the checkout, whose folder mpidl/ would hide the installed package.
plugin() (cd / && python -c 'from mpidl.cli.launch.launcher import slurm_plugin; print(slurm_plugin())')

# Runs a program as ranks, one for each task of the allocation.
ranks() {
    [ -n "${SLURM_MPI_TYPE:-}" ] || SLURM_MPI_TYPE=$(plugin)
    export SLURM_MPI_TYPE
    echo "srun --mpi=$SLURM_MPI_TYPE $*"
    srun "$@"
}

# Trains. What was stopped on request has saved and says so by status 75: SLURM's --signal before the time limit, a job
# that takes the nodes, `scancel --signal=USR1`. Then the job is put back into the queue under its own number, finds its
# outputs there and goes on. No trap here: a signal to this shell means that SLURM ends the job or requeues it itself.
train() {
    local output status=0
    output=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
    ranks mpidl train --resume --output "$output" "$@" || status=$?
    [ "$status" -ne 75 ] || requeue
    exit "$status"
}

requeue() {
    # Not a job that its owner has cancelled meanwhile.
    [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ] || return 0
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60 # until SLURM ends this shell, in a moment
    else
        echo "This job may not be requeued. It goes on if you submit it again with its --output: what was given, and" \
            "--output $output" >&2
    fi
}
