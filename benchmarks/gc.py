"""Garbage collection: random workspaces, and what a sweep with early stopping leaves on the disk.

    make bench NAME=gc                        # 1,000 random states and a sweep of 20 trials
    make bench NAME=gc ARGS="--states 100 --trials 8"

The last line is JSON. `lost`: random workspaces in which something needed was removed.
`left_over_top`: bytes of runs, models, sweeps and shards after `gc`, over the bytes of the bundles
of the best trials. `gc_overhead_share`: seconds of `gc` over those of the sweep before it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = 3
SWEEP = [sys.executable, "-c", "import sys; from vinedresser.cli import main; sys.exit(main())"]


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def run(*words: object, cwd: Path) -> tuple[str, float]:
    """Standard output and seconds of a command of vinedresser."""
    started = time.perf_counter()
    done = subprocess.run(
        [*SWEEP, *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, time.perf_counter() - started


def random_states(count: int) -> int:
    """Random workspaces in which something needed was removed; the test prints the first."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=0",
         "tests/test_gc.py",
         "-k", "nothing_that_is_needed"],
        cwd=ROOT, env={**os.environ, "GC_STATES": str(count)}, check=False,
    )  # fmt: skip
    return done.returncode


def sweep_and_collect(trials: int) -> dict[str, float]:
    """Bytes and seconds of a sweep of short trials of a model of some megabytes, and of `gc`."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        for split, rows in (("train", 200), ("dev", 20)):
            lines = [
                " ".join("abcdef"[(i * k) % 6] for k in range(1, 6 + i % 3)) for i in range(rows)
            ]
            tag = "x" if split == "dev" else "y"
            for side in ("source", "target"):
                text = "".join(f"{tag} {line}\n" for line in lines)
                (here / f"{split}.{side}").write_text(text)
        model = {"kind": "transformer", "d_model": 256, "d_ff": 1024, "num_heads": 4,
                 "encoder_layers": 2, "decoder_layers": 2}  # fmt: skip
        task = {
            "name": "copies",
            "corpus": {
                split: {side: f"{split}.{side}" for side in ("source", "target")}
                for split in ("train", "dev")
            },
            "tokenizer": {"kind": "symbols"}, "metric": "per",
            "max_source_length": 20, "max_target_length": 20,
        }  # fmt: skip
        base = {
            "task": task, "model": model, "steps": 12, "checkpoint_every": 2,
            "optim": {"warmup_steps": 2}, "batch": {"max_padded_tokens": 128},
            "evaluation": {"num_evaluations": 4}, "compute": {"device": "cpu"},
        }  # fmt: skip
        space = {"optim.lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True}}
        study = {"name": "copies", "base": base, "space": space, "num_trials": trials,
                 "stopping": {"grace": 1, "factor": 3}}  # fmt: skip
        (here / "study.json").write_text(json.dumps(study))
        out, seconds = run("sweep", "study.json", "--json", cwd=here)
        found_trials = json.loads(out)["trials"]  # the best first
        states = [trial["state"] for trial in found_trials]
        best = [Path(trial["bundle"]) for trial in found_trials if trial["bundle"]][:TOP]
        space_folder = here / "workspace"
        parts = [space_folder / part for part in ("runs", "models", "sweeps", "shards")]
        before = sum(map(size, parts))
        checkpoints = len(list(space_folder.glob("runs/*/checkpoints")))
        found, gc_seconds = run("gc", f"top={TOP}", "--json", cwd=here)
        left = sum(map(size, parts))
        bundles = sum(map(size, best))
        return {
            "complete": states.count("complete"), "stopped": states.count("pruned"),
            "failed": states.count("fail"),
            "checkpoints_after_sweep": checkpoints, "bytes_after_sweep": before,
            "freed": json.loads(found)["freed_bytes"], "bytes_left": left, "top_bundles": bundles,
            "left_over_top": round(left / bundles, 4),
            "tracking_bytes": size(space_folder) - left,
            "sweep_seconds": round(seconds, 1), "gc_seconds": round(gc_seconds, 1),
            "gc_overhead_share": round(gc_seconds / seconds, 4),
        }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args()
    figures: dict[str, float] = {"states": given.states}
    if given.states:
        figures["lost"] = random_states(given.states)
    if given.trials:
        figures |= sweep_and_collect(given.trials)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
