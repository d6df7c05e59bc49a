"""Resources of workers, decided once for trials, worker groups and the checks before a start."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from vinedresser.config import Compute
from vinedresser.distributed.ray_state import autoscaler_limits, draining_nodes
from vinedresser.errors import MachineError

_log = logging.getLogger(__name__)

# What a trial of several workers takes while it waits for them; Tune refuses 0.
TRIAL_CPUS = 0.01
# Under this key a worker reports its placement group.
GROUP = "placement_group"
# Ray's limit for one start of a worker group, in seconds.
START_SECONDS = 60.0
# Seconds that a start waits for an autoscaler, whose nodes with GPUs take 5 to 10 minutes, and for
# a node that takes the place of a lost one.
_AUTOSCALER_SECONDS, _REPLACEMENT_SECONDS = 900.0, 180.0
# Share of the resource accelerator_type:KIND, of which each node with such GPUs has 1.
_KIND_SHARE = 0.001


def nodes() -> list[Mapping[str, float]]:
    """Return the resources of each node, without those whose loss has been announced."""
    lost = draining_nodes()
    return [
        node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeID"] not in lost
    ]


def worker_resources(compute: Compute) -> dict[str, float]:
    """Return what Ray reserves for one worker of a run, which may be a whole trial."""
    gpus = float(compute.cuda_devices if compute.gpus == "auto" else compute.gpus)
    if compute.gpus == "auto" and compute.may_use_gpu and not gpus:
        gpus = float(any(one.get("GPU", 0) for one in [*nodes(), autoscaler_limits()]))
    resources = {"CPU": float(compute.threads)} | ({"GPU": gpus} if gpus else {})
    if gpus and compute.accelerator:
        resources[f"accelerator_type:{compute.accelerator}"] = _KIND_SHARE
    return resources


def num_groups(compute: Compute) -> int:
    """Return the number of worker groups that fit on the connected nodes at a time."""
    per_worker = worker_resources(compute)
    slots = [
        min(int(node.get(name, 0) / count + 1e-6) for name, count in per_worker.items())
        for node in nodes()
    ]
    if compute.placement == "strict_pack":
        return sum(count // compute.workers for count in slots)
    if compute.placement != "strict_spread":
        return sum(slots) // compute.workers
    groups = 0  # each takes a slot on as many nodes as it has workers
    while sum(min(count, groups + 1) for count in slots) >= (groups + 1) * compute.workers:
        groups += 1
    return groups


def num_groups_to_come(compute: Compute) -> int:
    """Return the number of worker groups that fit once the autoscaler has added what it may."""
    limits, per_worker = autoscaler_limits(), worker_resources(compute)
    return int(min(limits.get(name, 0) / count for name, count in per_worker.items())) // (
        compute.workers
    )


def start_seconds(compute: Compute) -> float:
    """Return how long a worker group that had room before waits for room."""
    if compute.start_seconds is not None:
        return compute.start_seconds
    return _AUTOSCALER_SECONDS if num_groups_to_come(compute) else _REPLACEMENT_SECONDS


def require(compute: Compute, what: str) -> None:
    """Raise at once where Ray would wait for resources that never come.

    Where they may come, the group's resources are requested and released once: an autoscaler adds
    nodes for what is requested only.

    Raises:
        MachineError: the cluster has less than `what` needs, after compute.start_seconds too.
    """
    if num_groups(compute):
        return
    is_waiting = compute.start_seconds is not None or num_groups_to_come(compute) > 0
    patience = start_seconds(compute) if is_waiting else 0.0
    per_worker, workers = worker_resources(compute), compute.workers
    wanted = ", ".join(f"{count * workers:g} {name}" for name, count in per_worker.items())
    if patience:
        _log.info("%s needs %s; waiting up to %.0f s for them", what, wanted, patience)
        begun = time.monotonic()
        group = placement_group([per_worker] * workers, strategy=compute.placement.upper())
        try:
            while time.monotonic() - begun < patience:
                if group.wait(timeout_seconds=1):  # Ctrl-C is seen between two waits
                    _log.info("%s has them after %.0f s", what, time.monotonic() - begun)
                    return
        finally:
            remove_placement_group(group)
    have = nodes()
    for name, count in per_worker.items():
        total = sum(node.get(name, 0) for node in have)
        if total < count * workers:
            lower = "compute.threads" if name == "CPU" else "set compute.gpus=0"
            raise MachineError(
                f"{what} needs {count * workers:g} {name}, the cluster has {total:g} in all; lower "
                f"compute.workers or {lower}, name a larger cluster, or set compute.start_seconds "
                "to wait for nodes"
            )
    raise MachineError(
        f"{what} needs {wanted}, which the nodes of the cluster have in sum, but not together as "
        f"compute.placement {compute.placement} asks; lower compute.threads or change the placement"
    )


def release_group(report: Mapping[str, Any]) -> None:
    """Remove the placement group that a report of a worker came from, if it is still there."""
    from ray._raylet import PlacementGroupID

    if GROUP in report:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(report[GROUP])))
