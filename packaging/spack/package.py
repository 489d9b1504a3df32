# Copyright Spack Project Developers. See COPYRIGHT file for details.
#
# SPDX-License-Identifier: (Apache-2.0 OR MIT)

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyMpidl(PythonPackage):
    """Distributed deep learning for PyTorch over the MPI that a cluster already has."""

    pypi = "mpidl/mpidl-0.1.0.tar.gz"

    license("MIT", checked_by="mpidl")

    # The checksum comes with the release: `spack checksum py-mpidl`.
    version("0.1.0")

    variant("jobs", default=False, description="The data of the job jobs/digits.py")
    variant("plot", default=False, description="The pictures of mpidl bench and mpidl plot")
    variant("cuda", default=False, description="CUDA kernels, and arrays of cupy")

    depends_on("c", type="build")
    depends_on("cxx", type="build", when="+cuda")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@70.1:", type="build")

    depends_on("mpi", type="run")
    depends_on("py-numpy@1.24:", type=("build", "run"))
    depends_on("py-mpi4py@4.0:", type=("build", "run"))
    depends_on("py-torch@2.6:", type=("build", "run"))
    depends_on("py-safetensors@0.4:", type=("build", "run"))
    depends_on("py-cffi@1.15:", type=("build", "run"))
    depends_on("py-click@8.1:", type=("build", "run"))
    depends_on("py-rich@13:", type=("build", "run"))

    depends_on("py-scikit-learn@1.2:", type=("build", "run"), when="+jobs")
    depends_on("py-matplotlib@3.7:", type=("build", "run"), when="+plot")
    depends_on("py-cupy@13:", type=("build", "run"), when="+cuda")
    depends_on("cuda@12:", type=("build", "run"), when="+cuda")

    def setup_build_environment(self, env: EnvironmentModifications) -> None:
        env.set("MPIDL_CUDA", "1" if self.spec.satisfies("+cuda") else "0")
        if self.spec.satisfies("+cuda"):
            env.set("CUDA_HOME", self.spec["cuda"].prefix)
