# shellcheck shell=bash
# What differs from site to site. This is the only file here that you edit; the .sbatch files read it on the first node.
# Account and partition are for the command line (sbatch --account=... --partition=...) or SBATCH_ACCOUNT and
# SBATCH_PARTITION in your shell's start-up file.

# ---------------------------------------------------------------------------------------------------------- environment
# Everything must lie where all nodes see it. An environment that was active when you called sbatch is used as it is;
# else .venv in the folder from which you called it, as jobs/quickstart.sh makes it.
#
# module purge
# module load gcc openmpi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -e .venv/bin/activate ]; then
    # shellcheck disable=SC1091 # not there in every checkout
    source .venv/bin/activate
fi

# ----------------------------------------------------------------------------------------------------------------- srun
# The plugin by which srun tells ranks of each other, as `srun --mpi=list` names them. Unset: chosen by the mpirun that
# belongs to the environment, pmi2 for MPICH, Intel MPI and MVAPICH, pmix for Open MPI.
#
# export SLURM_MPI_TYPE=pmix

# -------------------------------------------------------------------------------------------------------------- network
# MPI usually finds the fast network itself. If `sbatch jobs/check.sbatch` shows slow or hanging lines between nodes, name
# the network here; variables of the job's environment are passed to all ranks.
#
# MPICH and others built on UCX:
# export UCX_NET_DEVICES=mlx5_0:1    # a fast network by its device; ucx_info -d lists them
# export UCX_TLS=tcp,self            # plain Ethernet
# MPICH from PyPI by libfabric instead of UCX: the remedy for starts that fail now and then under srun with
# "mpi/pmi2: value not properly terminated in client request" (README.md says why):
# export MPIR_CVAR_CH4_NETMOD=ofi
# Open MPI over Ethernet:
# export OMPI_MCA_btl_tcp_if_include=eth0
# Intel MPI:
# export I_MPI_PMI_LIBRARY=/usr/lib64/libpmi2.so
