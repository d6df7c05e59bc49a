"""The connection of a command to a named cluster."""

import subprocess
import sys

WATCH = """
import socket, time
from vinedresser.cluster import connect

connect._HEAD_LOOK_SECONDS, connect._HEAD_SECONDS = 0.05, 0.2
head = socket.create_server(("127.0.0.1", 0))
with connect.watching_head(f"127.0.0.1:{head.getsockname()[1]}"):
    time.sleep(0.5)
    print("alive", flush=True)
    head.close()
    time.sleep(60)
"""


def test_a_command_whose_head_node_is_gone_ends_with_the_code_of_the_environment() -> None:
    """Ray ends it with 1, after which a supervisor does not run the same command again."""
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout == "alive\n"
    assert done.returncode == 3
    assert "run the same command to resume" in done.stderr
