"""`mpidl bench import` as a program of the checkout; it takes the same options.

python benchmarks/import.py --output benchmarks/results
"""

import sys

from mpidl.cli import main

main(["bench", "import", *sys.argv[1:]])
