"""Resources of worker groups, compared with those of the connected Ray cluster."""

from collections.abc import Mapping
from typing import Any

from vinedresser.config import Compute
from vinedresser.errors import MachineError

# What a trial of several workers takes while it waits for them; Tune refuses 0.
TRIAL_CPUS = 0.01
# Under this key a worker reports its placement group.
GROUP = "placement_group"


def of_cluster() -> dict[str, float]:
    """Return all resources of the connected cluster."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def require(compute: Compute, what: str) -> None:
    """Raise at once where Ray would wait for resources that never come.

    Raises:
        MachineError: the cluster has less in all than one `what` needs.
    """
    have, wanted = of_cluster(), _wanted(compute)
    for name, count in wanted.items():
        if count > have.get(name, 0):
            lower = "compute.threads" if name == "CPU" else "set compute.device=cpu"
            raise MachineError(
                f"{what} needs {count} {name}, the cluster has {have.get(name, 0):g} in all; "
                f"lower compute.workers or {lower}, or name a larger cluster"
            )


def num_groups(compute: Compute) -> int:
    """Return the number of worker groups that fit into the connected cluster at a time."""
    have = of_cluster()
    return min(int(have.get(name, 0) // count) for name, count in _wanted(compute).items())


def is_on_gpus(compute: Compute) -> bool:
    """Return whether each worker of a group takes a GPU; `auto` takes one where there are any."""
    has_any = bool(of_cluster().get("GPU", 0))
    return compute.device == "cuda" or (compute.device == "auto" and has_any)


def _wanted(compute: Compute) -> dict[str, int]:
    wanted = {"CPU": compute.workers * compute.threads}
    return wanted | ({"GPU": compute.workers} if is_on_gpus(compute) else {})


def release_group(report: Mapping[str, Any]) -> None:
    """Remove the placement group that a report of a worker came from, if it is still there."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if GROUP in report:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(report[GROUP])))
