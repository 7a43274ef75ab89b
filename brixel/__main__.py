"""`python -m brixel`: the command line."""

import sys

from brixel.cli.app import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
