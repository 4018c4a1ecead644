"""`python -m moses` is the command line."""

import sys

from moses.cli import main

if __name__ == "__main__":
    sys.exit(main())
