"""Run a script as one rank: `python rank.py FILE ARGUMENTS`; gloo's threads may outlive it (process/ending.py)."""

import runpy
import sys
import traceback

from maskwise.process.ending import end_process

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    end_process(status)
