"""`python -m bench.accuracy [one]`."""

import sys

from . import lmms, rows

if __name__ == "__main__":
    sys.exit(lmms.main(sys.argv[2:]) if sys.argv[1:2] == ["one"] else rows.main(sys.argv[1:]))
