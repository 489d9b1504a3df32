"""A plugin of pytest (`-p emulated`): the extension is the library that MPIDL_TEST_LIBRARY names."""

from __future__ import annotations

import os
from pathlib import Path

from mpidl.native import library

library._LIBRARY = Path(os.environ["MPIDL_TEST_LIBRARY"])
