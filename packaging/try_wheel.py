"""Shows that an installed wheel of mpidl works: the library gathers and scatters, and the metadata have its version.

Needs numpy, cffi and mpidl; no MPI, no torch, no compiler. `packaging/wheel.sh` and cibuildwheel run it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import numpy as np

import mpidl

arrays = [np.arange(3, dtype=np.float32), np.full(70_000, 2.0, np.float32)]
flat = np.zeros(70_003, np.float16)
packed = mpidl.pack(arrays, flat, scale=0.5)
assert packed.count == flat.size
assert packed.finite
assert flat[:4].tolist() == [0.0, 0.5, 1.0, 1.0]
mpidl.unpack(flat, arrays)
assert arrays[1].tolist() == [1.0] * 70_000
assert importlib.metadata.version("mpidl") == mpidl.__version__
libc = " ".join(platform.libc_ver())
print(f"mpidl {mpidl.__version__} works on Python {sys.version.split()[0]}, {libc}, {platform.machine()}")
