"""`mpidl bench parameter-server` as a program of the checkout; it takes the same options.

mpidl run -n 4 -- python benchmarks/parameter_server.py --output benchmarks/results
"""

import sys

from mpidl.cli import main

main(["bench", "parameter-server", *sys.argv[1:]])
