# shellcheck shell=bash
# What the .sbatch files share: how ranks are started, and what becomes of a job that was stopped. Sites edit site.sh only.

set -euo pipefail
# shellcheck source=jobs/site.sh
source jobs/site.sh

# srun does not take this over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Not from the checkout, whose folder mpidl/ would hide the installed package.
plugin() (cd / && python -c 'from mpidl.cli.launcher import slurm_plugin; print(slurm_plugin())')

# Runs a program as ranks, one for each task of the allocation.
ranks() {
    [ -n "${SLURM_MPI_TYPE:-}" ] || SLURM_MPI_TYPE=$(plugin)
    export SLURM_MPI_TYPE
    echo "srun --mpi=$SLURM_MPI_TYPE $*"
    srun "$@"
}
