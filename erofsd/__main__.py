"""``python -m erofsd``."""

import sys

from erofsd.cli import main

if __name__ == "__main__":
    sys.exit(main())
