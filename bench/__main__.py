"""python -m bench [run | compare | prefill | released | figure | serve | model | threads]; without one: run.

Each has --help.
"""

import importlib
import sys

COMMANDS = ("run", "compare", "prefill", "released", "figure", "serve", "model", "threads")

if __name__ == "__main__":
    command, arguments = (
        (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in COMMANDS else ("run", sys.argv[1:])
    )
    sys.exit(importlib.import_module(f"bench.{command}").main(arguments))
