"""State of the connected cluster for which Ray has no public function, in one place.

Announced losses of nodes, the limits of the autoscaler, and a small table of keys in the head node.
"""

import ray

from vinedresser.errors import MachineError

try:
    from ray._private.state import state
    from ray.experimental.internal_kv import (
        _internal_kv_del,
        _internal_kv_list,
        _internal_kv_put,
    )
except ImportError as error:
    raise MachineError(
        f"ray {ray.__version__} lacks {error.name}, which clusters need; Fix: install the version "
        "of ray that constraints.txt names"
    ) from error

_NAMESPACE = "vinedresser"


def draining_nodes() -> set[str]:
    """Return the ids of the nodes whose loss has been announced."""
    return set(state.get_draining_nodes())


def autoscaler_limits() -> dict[str, float]:
    """Return all resources that the autoscaler may reach; empty where there is none."""
    return dict(state.get_max_resources_from_cluster_config() or {})


def put_key(key: str) -> None:
    """Add a key to the table, which every process of the cluster reads."""
    _internal_kv_put(key, b"1", overwrite=True, namespace=_NAMESPACE)


def delete_key(key: str) -> None:
    """Remove a key, and all that begin with it."""
    _internal_kv_del(key, del_by_prefix=True, namespace=_NAMESPACE)


def keys_of(prefix: str) -> list[str]:
    """Return the keys that begin with a prefix."""
    return [key.decode() for key in _internal_kv_list(prefix, namespace=_NAMESPACE)]
