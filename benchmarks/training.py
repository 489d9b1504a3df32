"""`mpidl bench training` as a program of the checkout; it takes the same options.

mpidl run -n 2 -- python benchmarks/training.py --output benchmarks/results
"""

import sys

from mpidl.cli import main

main(["bench", "training", *sys.argv[1:]])
