"""What cron, systemd and Airflow get: read by their own programs where these are, and run here."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vinedresser.cluster.emit import Host, airflow, cron, systemd
from vinedresser.cluster.manifests import Tick

# Characters that crontabs, units and shells treat in their own ways.
FOLDER = '50% of $HOME\'s "work"'
PACKAGES = "my_zoo,$other zoo"
WORDS = ["schedule", "tick", "pipelines.nightly", "--workspace"]


@pytest.fixture
def tick(tmp_path: Path) -> Tick:
    return Tick(
        name="Nightly_run", source="pipelines.nightly", workspace=str(tmp_path / FOLDER),
        every="0 3 * * *", zone="Europe/Berlin", environment={"VINEDRESSER_PACKAGES": PACKAGES},
    )  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine whose program notes how it is called, and ends with the code in `code`."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    program = tmp_path / "bin" / "vinedresser"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
        "called = [os.getcwd(), os.environ['VINEDRESSER_PACKAGES'], sys.argv[1:]]\n"
        "pathlib.Path('called').write_text(json.dumps(called))\nprint('done')\n"
        "code = pathlib.Path('code')\nsys.exit(int(code.read_text()) if code.exists() else 0)\n"
    )
    program.chmod(0o755)
    return Host(program, folder)


def require_call(tick: Tick, folder: Path) -> None:
    """Check how the program was called."""
    called = json.loads((folder / "called").read_text())
    assert called == [str(folder), PACKAGES, [*WORDS, tick.workspace, "--exit-code"]]


def test_the_line_of_cron_runs_as_cron_runs_it(tick: Tick, host: Host) -> None:
    (line,) = cron(tick, host).values()
    times, command = re.fullmatch(r"((?:\S+ ){5})(.*)\n", line).groups()  # type: ignore[union-attr]
    assert times == "*/2 * * * * "
    # Cron cuts a line at each percent sign that has no backslash, and removes the backslashes.
    assert not re.search(r"(?<!\\)%", command)
    command = command.replace("\\%", "%")
    subprocess.run(["/bin/sh", "-c", command], env={"PATH": "/usr/bin:/bin"}, cwd="/", check=True)
    require_call(tick, Path(host.folder))
    assert (Path(host.folder) / "Nightly_run.log").read_text() == "done\n"


def test_the_unit_runs_its_command(tick: Tick, host: Host) -> None:
    service, timer = systemd(tick, host).values()
    settings = dict(
        line.split("=", 1) for line in service.splitlines() if "=" in line and line[0] != "#"
    )
    plain = {key: value.replace("%%", "%") for key, value in settings.items()}
    (variable,) = shlex.split(plain["Environment"])
    subprocess.run(
        shlex.split(plain["ExecStart"].replace("$$", "$")), cwd=plain["WorkingDirectory"],
        env=dict([variable.split("=", 1)]), check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    require_call(tick, Path(host.folder))
    assert settings["Type"] == "oneshot"  # never twice at a time
    assert settings["SuccessExitStatus"] == "75"
    assert "OnCalendar=*:0/2\n" in timer


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tick: Tick, host: Host, tmp_path: Path) -> None:
    for name, text in systemd(tick, host).items():
        (tmp_path / name).write_text(text)
    units = [str(path) for path in tmp_path.glob("vinedresser-nightly-run.*")]
    assert len(units) == 2

    def verify() -> str:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return f"{done.returncode} {done.stderr}"

    assert verify() == "0 "
    service = tmp_path / "vinedresser-nightly-run.service"
    service.write_text(service.read_text().replace("KillMode=mixed", "KillMod=mixed"))
    assert "KillMod" in verify()


@pytest.mark.parametrize(("code", "raised"), [(0, ""), (2, "final"), (4, "final"), (3, "again")])
def test_the_dag_file_repeats_by_exit_code(
    tick: Tick, host: Host, monkeypatch: Any, code: int, raised: str
) -> None:
    """The file itself runs; only Airflow is replaced, with the names that it imports."""

    class FinalError(Exception):
        pass

    tasks: list[Any] = []

    class Dag:
        def __init__(self, **settings: Any) -> None:
            assert settings["max_active_runs"] == 1
            assert settings["catchup"] is False

        def __enter__(self) -> None:
            """As Airflow's."""

        def __exit__(self, *_: object) -> None:
            """As Airflow's."""

    def task(**_: Any) -> Any:
        return lambda function: lambda: tasks.append(function)

    for name, content in {
        "airflow": {}, "airflow.timetables": {},
        "airflow.sdk": {"DAG": Dag, "task": task},
        "airflow.sdk.exceptions": {"AirflowFailException": FinalError},
        "airflow.timetables.trigger": {"CronTriggerTimetable": lambda *a, **_: a},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (text,) = airflow(tick, host).values()
    assert ast.get_docstring(ast.parse(text))
    exec(compile(text, "dag.py", "exec"), {"__name__": "dag"})
    (run,) = tasks
    (Path(host.folder) / "code").write_text(str(code))
    try:
        run()
        found = ""
    except FinalError:
        found = "final"
    except RuntimeError:
        found = "again"
    assert found == raised
    require_call(tick, Path(host.folder))
