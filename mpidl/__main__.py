"""`python -m mpidl` is the command `mpidl`."""

from __future__ import annotations

from mpidl.cli import main

if __name__ == "__main__":
    main()
