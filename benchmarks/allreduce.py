"""`mpidl bench allreduce` as a program of the checkout; it takes the same options.

mpidl run -n 2 -- python benchmarks/allreduce.py --output benchmarks/results
"""

import sys

from mpidl.cli import main

main(["bench", "allreduce", *sys.argv[1:]])
