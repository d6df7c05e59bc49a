"""Guard of a process session: kills what is left of it when the process that holds the pipe dies.

Run as a script without the package, so that it starts in milliseconds: the arguments are the
session and the seconds that its leader may take after its SIGTERM.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_ROUNDS = 50


def main(session: int, grace: float) -> None:
    """Wait for the end of standard input, then end the session."""
    sys.stdin.read()
    time.sleep(grace)
    for _ in range(_ROUNDS):
        is_over = True
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) == session:
                    os.kill(int(entry.name), signal.SIGKILL)
                    is_over = False
        if is_over:
            return
        time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
