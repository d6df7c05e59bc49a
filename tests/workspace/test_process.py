"""Identity of processes: alive, dead, reused ids, other hosts and containers."""

import subprocess
import sys

import psutil

from vinedresser.workspace import process
from vinedresser.workspace.process import is_alive, process_label, this_process


def test_liveness():
    host, pid, started = this_process().rsplit("~", 2)
    assert is_alive(this_process())
    assert is_alive(f"another-host~{pid}~{started}")
    assert not is_alive(f"{host}~{pid}~{int(started) - 100}")
    for wrong in ("", "x", f"{host}~x~1", f"{host}~1~x", f"{host}~{2**70}~1", f"{host}~-1~1"):
        assert not is_alive(wrong)


def test_a_killed_process_that_nobody_reaped_is_dead():
    code = (
        "import time; from vinedresser.workspace.process import this_process\n"
        "print(this_process(), flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        owner = child.stdout.readline().strip()
        assert is_alive(owner)
        child.kill()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert not is_alive(owner)


def test_containers_of_one_host_name_do_not_judge_each_others_processes(monkeypatch, tmp_path):
    _, pid, _ = this_process().split("~")
    (tmp_path / "namespace").symlink_to("pid:[7]")
    monkeypatch.setattr(process, "_NAMESPACE", tmp_path / "namespace")
    other = this_process()
    monkeypatch.undo()
    host = other.split("~")[0]
    assert is_alive(f"{host}~{pid}~1")  # a dead one, if it were of this host
    assert process_label(other) == f"process {pid} on {host.rpartition('.')[0]}"
