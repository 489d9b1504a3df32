"""`mpidl bench pack` as a program of the checkout; it takes the same options.

python benchmarks/pack.py --output benchmarks/results
"""

import sys

from mpidl.cli import main

main(["bench", "pack", *sys.argv[1:]])
