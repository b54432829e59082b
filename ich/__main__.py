"""`python -m ich` is `ich`."""

import sys

from ich.cli import main

if __name__ == "__main__":
    sys.exit(main())
