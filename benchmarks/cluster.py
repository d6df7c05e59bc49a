"""Sweeps and worker groups on a cluster of several nodes on this machine, with faults.

`make bench NAME=cluster ARGS="--sections gpus,drains,kills"`. Nodes are raylets with declared CPUs
and GPUs; on a busy machine set RAY_raylet_start_wait_time_s=300. Training is on the CPU, of a tiny
Transformer that also sleeps in each update, and writes down when and where each process trained.
The last line is JSON with the figures of the sections:

- gpus: sweeps of 8 trials on 2 nodes x 2 GPUs: how many train at once, and which GPU each sees;
- starts: time to the first update of one trial, and of the last of 8 on 8 idle slots;
- drains: a worker group one of whose nodes is announced as lost;
- kills: nodes killed in a sweep of 8;
- head: the whole cluster killed, then the same command on another one;
- nfs: SIGTERM to a sweep on two hosts with caches of 30 s (`--nfs-like`, needs root);
- grow: GPUs that appear 90 s after the command;
- retrain: share of the driver in the CPU seconds of a pipeline, with a head node of 0 CPUs.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from ray import util as ray_util
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from vinedresser.cluster.connect import ENVIRONMENT

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STORE_BYTES = 80_000_000
PATIENCE = 1500.0
HEAD = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}

# Package of a user: its model notes each process that trains, with its GPUs.
WITNESS = """
import json, os, time
from pathlib import Path
import torch
from trainables.transformer import Transformer, TransformerConfig

seen = {}

class SlowTransformer(Transformer):
    def encode(self, *args, **settings):
        if self.training and torch.is_grad_enabled():
            self.witness()
        return super().encode(*args, **settings)

    def witness(self):
        found = seen.setdefault(id(self), {})
        if not found:
            import ray
            context = ray.get_runtime_context() if ray.is_initialized() else None
            found.update(started=time.time(), calls=0, pid=os.getpid(),
                         node=context.get_node_id() if context else "",
                         cuda=os.environ.get("CUDA_VISIBLE_DEVICES"))
            found["file"] = f"{WITNESSES}/{os.getpid()}-{time.time_ns()}.json"
        time.sleep(self.pause)
        found.update(calls=found["calls"] + 1, last=time.time())
        Path(found["file"]).write_text(json.dumps(found))

class WitnessConfig(TransformerConfig):
    pause: float = 0.0

    def build(self, vocabulary):
        model = super().build(vocabulary)
        model.__class__, model.pause = SlowTransformer, self.pause
        return model
"""


class Bench:
    """Folder, corpus and cluster of one section."""

    def __init__(self, folder: Path, name: str, *, is_started: bool = True) -> None:
        self.folder = folder / name
        self.witnesses = self.folder / "witnesses"
        self.witnesses.mkdir(parents=True)
        package = self.folder / "witness"
        package.mkdir()
        (package / "__init__.py").write_text("")
        code = f"WITNESSES = {str(self.witnesses)!r}\n{WITNESS}"
        (package / "slow.py").write_text(code)
        self.corpus()
        self.workspace = self.folder / "ws"
        # Nodes have the package's path; its name in VINEDRESSER_PACKAGES is the command's to bring.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(self.folder), str(ROOT / "platform"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        )
        os.environ.pop("VINEDRESSER_PACKAGES", None)
        self.nodes: list[Any] = []
        self.cluster: Any = None
        if is_started:
            self.start_head()

    def start_head(self) -> None:
        """Start a cluster of a head without CPUs."""
        self.cluster = Cluster(initialize_head=True, head_node_args=HEAD)

    def corpus(self) -> None:
        """Write the corpus: a row reversed."""
        draw = random.Random(0)  # noqa: S311
        for split, count in (("train", 800), ("dev", 20), ("test", 20)):
            rows = [draw.choices("abcdef", k=draw.randint(2, 6)) for _ in range(count)]
            for side, step in (("source", 1), ("target", -1)):
                lines = (" ".join(row[::step]) + "\n" for row in rows)
                (self.folder / f"{split}.{side}").write_text("".join(lines))

    def add(self, *, cpus: int = 1, gpus: int = 0) -> None:
        """Add a node."""
        self.nodes.append(
            self.cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE_BYTES)
        )

    def kill(self) -> None:
        """Kill the oldest node without notice."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def drain(self, number: int = 0, seconds: int = 20) -> None:
        """Announce the loss of a node; the cluster leaves it running."""
        node = self.nodes.pop(number).node_id
        deadline = (int(time.time()) + seconds) * 1000
        # 2: preemption.
        GcsClient(self.cluster.address).drain_node(node, 2, "spot", deadline)

    def experiment(self, **changes: Any) -> dict[str, Any]:
        """Return a tiny experiment as JSON."""
        corpus = {
            split: {side: str(self.folder / f"{split}.{side}") for side in ("source", "target")}
            for split in ("train", "dev", "test")
        }
        task = {
            "name": "reversal", "corpus": {"kind": "text", **corpus}, "metric": "per",
            "tokenizer": {"kind": "symbols"}, "max_source_length": 20, "max_target_length": 20,
            "cleaning": {"leakage": "allow"},
        }  # fmt: skip
        model = {
            "kind": "witness.slow", "d_model": 32, "d_ff": 64, "num_heads": 4, "dropout": 0.1,
            "encoder_layers": 1, "decoder_layers": 1, "pause": changes.pop("pause", 0.05),
        }  # fmt: skip
        return {
            "name": "tiny", "task": task, "model": model, "steps": changes.pop("steps", 200),
            "checkpoint_every": changes.pop("checkpoint_every", 20),
            "optim": {"warmup_steps": 10},
            "batch": changes.pop("batch", {"max_padded_tokens": 128}),
            "evaluation": {"num_evaluations": 2, "attention_every": 0},
            "compute": {"precision": "fp32", **changes},
        }  # fmt: skip

    def study(self, *, trials: int = 8, **changes: Any) -> dict[str, Any]:
        """Return a study over the learning rate as JSON."""
        space = {"optim.lr": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}}
        return {
            "name": "tiny-lr", "base": self.experiment(**changes), "space": space,
            "num_trials": trials, "stopping": None,
        }  # fmt: skip

    def start(self, verb: str, value: Mapping[str, Any], name: str = "ws") -> subprocess.Popen[str]:
        """Start a command on the cluster."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(value))
        environment = {
            **os.environ, "RAY_ADDRESS": self.cluster.address, "VINEDRESSER_PACKAGES": "witness",
        }  # fmt: skip
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(
            [BIN / "vinedresser", verb, str(path), "--workspace",
             str(self.folder / name), "--json"],
            env=environment, stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, verb: str, value: Mapping[str, Any], name: str = "ws") -> int:
        """Run a command on the cluster; return its exit code."""
        return self.start(verb, value, name).wait(timeout=PATIENCE)

    def seen(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Return what each training process noted, those that started first come first."""
        found = []
        for path in self.witnesses.iterdir():
            with contextlib.suppress(ValueError):  # killed while it wrote
                found.append(json.loads(path.read_text()))
        return sorted((w for w in found if w["started"] > since), key=lambda w: w["started"])

    def newest_checkpoint(self, name: str = "ws") -> Path | None:
        """Return the newest checkpoint of all runs of a workspace."""
        paths = (self.folder / name).glob("runs/*/checkpoints/step-????????")
        return max(paths, key=lambda path: path.name, default=None)

    def trials(self, name: str = "ws") -> list[str]:
        """Return the states of the trials of the only sweep."""
        (outcome,) = (self.folder / name).glob("sweeps/*/outcome.json")
        return [trial["state"] for trial in json.loads(outcome.read_text())["trials"]]


@contextlib.contextmanager
def bench(folder: Path, name: str) -> Iterator[Bench]:
    """Start the cluster of a section, and end it."""
    made = Bench(folder, name)
    try:
        yield made
    finally:
        made.cluster.shutdown()


def gpus(folder: Path) -> dict[str, Any]:
    """Trials with 1, 0.5 and 0 GPUs on 2 nodes with 4 CPUs and 2 GPUs each."""
    found: dict[str, Any] = {}
    with bench(folder, "gpus") as here:
        for _ in range(2):
            here.add(cpus=4, gpus=2)
        for share, pause in (("auto", 0.05), (0.5, 0.3), (0, 0.05)):
            since = time.time()
            code = here.run("sweep", here.study(gpus=share, pause=pause), f"ws-{share}")
            seen = here.seen(since)
            at_once = [[b for b in seen if b["started"] <= a["started"] <= b["last"]] for a in seen]
            found[f"gpus_{share}"] = {
                "exit": code,
                "trials": here.trials(f"ws-{share}"),
                "at_once": max(map(len, at_once)),
                "gpus_at_once": max(
                    len({(b["node"], b["cuda"]) for b in all_}) for all_ in at_once
                ),
                "visible": sorted({str(w["cuda"]) for w in seen}),
            }
    return found


def starts(folder: Path) -> dict[str, Any]:
    """Seconds from the command to the first update of one trial, and of the last of 8."""
    with bench(folder, "starts") as here:
        for _ in range(2):
            here.add(cpus=4)
        found = []
        for trials in (1, 8):
            since = time.time()
            study = here.study(trials=trials, pause=0.5, steps=100)
            code = here.run("sweep", study, f"ws-{trials}")
            seen = here.seen(since)
            assert code == 0
            found.append(seen[trials - 1]["started"] - since)
    return {"start_1_trial_seconds": found[0], "start_8_trials_seconds": found[1]}


def drains(folder: Path, times: int) -> dict[str, Any]:
    """Drain a node of a group of two at random steps; compare with the undisturbed run."""
    draw, found = random.Random(3), []  # noqa: S311
    with bench(folder, "drains") as here:
        for _ in range(4):
            here.add()
        value = here.experiment(workers=2, steps=120, checkpoint_every=1000, batch={
            "max_padded_tokens": 128, "per_update": 2})  # fmt: skip
        assert here.run("train", value, "ws-whole") == 0
        whole = _outcome(here, "ws-whole")
        for number in range(times):
            name, since = f"ws-{number}", time.time()
            command = here.start("train", value, name)
            at = draw.randint(5, 100)
            while max((w["calls"] for w in here.seen(since)), default=0) < at:
                time.sleep(0.05)
                assert command.poll() is None
            used = {w["node"] for w in here.seen(since)}
            victim = next(i for i, node in enumerate(here.nodes) if node.node_id in used)
            noticed = time.time()
            here.drain(victim)
            while (path := here.newest_checkpoint(name)) is None:
                time.sleep(0.02)
                assert command.poll() is None
            seconds = path.stat().st_mtime - noticed
            here.add()
            code = command.wait(timeout=PATIENCE)
            calls = sum(w["calls"] for w in here.seen(since))
            found.append({
                "at": at, "exit": code, "checkpoint_seconds": round(seconds, 2),
                "updates_lost": calls / 2 - 120, "same_bits": _outcome(here, name) == whole,
            })  # fmt: skip
            print(found[-1], flush=True)
    return {"drains": found}


def _outcome(here: Bench, name: str) -> Any:
    """Return what a finished run reached: its evaluations, and its weights by digest."""
    (path,) = (here.folder / name).glob("runs/*/outcome.json")
    manifest = json.loads((path.parent / "bundle" / "manifest.json").read_text())
    return json.loads(path.read_text())["history"], manifest["files"]["weights.safetensors"]


def kills(folder: Path, times: int) -> dict[str, Any]:
    """Kill a node at random times in sweeps of 8, and add another."""
    draw, found = random.Random(5), []  # noqa: S311
    with bench(folder, "kills") as here:
        for _ in range(2):
            here.add(cpus=2)
        steps, every, left, number = 200, 20, times, 0
        while left > 0:
            name, since, deaths = f"ws-{number}", time.time(), 0
            study = here.study(steps=steps, checkpoint_every=every, pause=0.15, device="cpu")
            command = here.start("sweep", study, name)
            while not here.seen(since) and command.poll() is None:
                time.sleep(0.2)
            while left > 0 and command.poll() is None:
                time.sleep(draw.uniform(5, 25))
                victim = here.nodes[0].node_id
                now = time.time()
                running = [
                    w for w in here.seen(since) if w["node"] == victim and now - w["last"] < 2
                ]
                if not running or command.poll() is not None:
                    continue
                here.kill()
                deaths, left = deaths + len(running), left - 1
                here.add(cpus=2)
            code = command.wait(timeout=PATIENCE)
            calls = sum(w["calls"] for w in here.seen(since))
            found.append({
                "exit": code, "trials": sorted(here.trials(name)), "trials_hit": deaths,
                "rerun_updates": calls - 8 * steps, "allowed": deaths * every,
            })  # fmt: skip
            print(found[-1], flush=True)
            number += 1
    return {"kills": found, "nodes_killed": times - left}


def head(folder: Path) -> dict[str, Any]:
    """Kill every process of the cluster; run the same command on another cluster."""
    with bench(folder, "head") as here:
        here.add(cpus=2)
        study = here.study(pause=0.1, device="cpu")
        command = here.start("sweep", study)
        while len(here.seen()) < 4 and command.poll() is None:
            time.sleep(0.2)
        cluster, here.cluster = here.cluster, None
        cluster.shutdown()
        code = command.wait(timeout=PATIENCE)
        first = sum(w["calls"] for w in here.seen())
        here.start_head()
        here.add(cpus=2)
        again = here.run("sweep", study)
        calls = sum(w["calls"] for w in here.seen())
        return {
            "head": {
                "exit_without_head": code, "exit_again": again, "trials": here.trials(),
                "updates_before": first, "rerun_updates": calls - 8 * 200,
            }
        }  # fmt: skip


def grow(folder: Path) -> dict[str, Any]:
    """Start a run that needs a GPU; add the node that has it 90 s later."""
    with bench(folder, "grow") as here:
        here.add(cpus=1)
        since = time.time()
        study = here.study(trials=2, gpus=1, start_seconds=600)
        command = here.start("sweep", study)
        time.sleep(90)
        is_waiting = command.poll() is None and not here.seen()
        here.add(cpus=1, gpus=1)
        added = time.time()
        code = command.wait(timeout=PATIENCE)
        seen = here.seen(since)
        return {
            "grow": {
                "waited": is_waiting,
                "exit": code,
                "seconds_after_node": seen[0]["started"] - added,
                "visible": [w["cuda"] for w in seen],
            }
        }  # fmt: skip


def nfs(folder: Path, tool: Path) -> dict[str, Any]:
    """SIGTERM to a sweep whose command and node see the workspace through caches of 30 s."""
    here = Bench(folder, "nfs", is_started=False)
    (here.folder / "root").mkdir()
    mount = here.folder / "mount"
    mount.mkdir()
    hosts = []
    for _ in range(2):
        words = [sys.executable, str(tool), str(here.folder / "root"), str(mount), "30"]
        # A mount namespace of its own is a host: the same path, other caches.
        script = f"mount --make-rprivate / && exec {' '.join(words)}"
        hosts.append(subprocess.Popen(["unshare", "--mount", "sh", "-c", script]))
    time.sleep(5)

    def on(host: int, *words: str | Path, **settings: Any) -> subprocess.Popen[bytes]:
        command = ["nsenter", "-t", str(hosts[host].pid), "-m", *words]
        return subprocess.Popen(command, start_new_session=True, **settings)

    ray, port = BIN / "ray", "6399"
    address = f"{ray_util.get_node_ip_address()}:{port}"
    store = ["--object-store-memory", str(STORE_BYTES), "--block"]
    nodes = [on(0, ray, "start", "--head", "--port", port, "--num-cpus", "0",
                "--include-dashboard", "false", *store)]  # fmt: skip

    def wait_for(count: int) -> None:
        for _ in range(300):
            time.sleep(1)
            with contextlib.suppress(Exception):  # not up yet
                if len(GcsClient(address).get_all_node_info(timeout=5)) >= count:
                    return

    wait_for(1)
    nodes.append(on(1, ray, "start", "--address", address, "--num-cpus", "4", *store))
    wait_for(2)
    study = here.study(trials=4, steps=3000, checkpoint_every=3000, device="cpu", pause=0.05)
    path = here.folder / "study.json"
    path.write_text(json.dumps(study))
    environment = {**os.environ, "RAY_ADDRESS": address, "VINEDRESSER_PACKAGES": "witness"}
    log = (here.folder / "log").open("w")
    words = [BIN / "vinedresser", "sweep", path, "--workspace", mount / "ws"]
    command = on(0, *words, env=environment, stdout=log, stderr=log)
    try:
        while sum(w["calls"] > 5 for w in here.seen()) < 4 and command.poll() is None:
            time.sleep(0.2)
        stopped = time.time()
        command.terminate()
        code = command.wait(timeout=PATIENCE)
        paths = (here.folder / "root").glob("ws/runs/*/checkpoints/step-*")
        seconds = sorted(round(path.stat().st_mtime - stopped, 2) for path in paths)
        return {"nfs": {"exit": code, "checkpoint_seconds": seconds,
                        "exit_seconds": round(time.time() - stopped, 1)}}  # fmt: skip
    finally:
        for process in [command, *reversed(nodes), *hosts]:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()


def retrain(folder: Path) -> dict[str, Any]:
    """Run a whole pipeline on a head without CPUs and one node; count the CPU seconds of each."""
    with bench(folder, "retrain") as here:
        here.add(cpus=2)
        weight = {"type": "float", "low": 0.05, "high": 2.0, "log": True}
        chain = {
            "name": "tiny-chain",
            "study": here.study(trials=2, steps=600, pause=0),
            "finalist": {"steps": 600},
            "pruning": {
                "overrides": {"steps": 600, "optim.warmup_steps": 10},
                "space": {"objective.head_penalty.weight": weight},
                "num_trials": 2,
            },
            "model_name": "tiny",
        }
        command = here.start("retrain", chain)
        seconds: dict[tuple[int, float], float] = {}
        while command.poll() is None:
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    used = one.cpu_times()
                    seconds[one.pid, one.create_time()] = used.user + used.system
            time.sleep(1)
        driver = sum(used for (pid, _), used in seconds.items() if pid == command.pid)
        whole = sum(seconds.values())
        return {
            "retrain": {"exit": command.returncode, "driver_cpu_seconds": driver, "all": whole},
            "driver_cpu_share": driver / whole,
        }


SECTIONS = {
    "gpus": gpus, "starts": starts, "drains": drains, "kills": kills, "head": head, "grow": grow,
    "nfs": nfs, "retrain": retrain,
}  # fmt: skip


def main() -> None:
    """Run the sections and print their figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default="gpus,starts,drains,kills,head,grow")
    parser.add_argument("--times", type=int, default=10, help="drains, and nodes killed")
    parser.add_argument("--nfs-like", type=Path, help="nfs: program that mounts ROOT at PATH")
    parser.add_argument("--keep", type=Path, help="folder for logs and workspaces")
    given = parser.parse_args()
    os.environ.update({**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
    os.environ |= {"RAY_AUTH_MODE": "disabled", "VINEDRESSER_ACCEPT_UNAUTHENTICATED": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vd-bench-") as temporary:
        folder = given.keep or Path(temporary)
        for name in given.sections.split(","):
            counted: dict[str, Any] = {}
            if name in ("drains", "kills"):
                counted["times"] = given.times
            if name == "nfs":
                counted["tool"] = given.nfs_like
            begun = time.time()
            figures |= SECTIONS[name](folder, **counted)
            print(name, json.dumps(figures), f"{time.time() - begun:.0f} s", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
