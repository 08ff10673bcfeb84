"""`python -m bench.judge train | evaluate | report | loss`."""

import sys

from . import evaluate, loss, report, train

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "report": report.main, "loss": loss.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m bench.judge {{{','.join(COMMANDS)}}} ...")
    COMMANDS[sys.argv[1]](sys.argv[2:])
