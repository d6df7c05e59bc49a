"""What every room's tests may ask for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets beside the repository; tests that need them skip where they are not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for the whole session; it must be asked for by tests marked `ray`."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    try:
        from vinedresser.cluster import connect
    except ModuleNotFoundError:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
        )
    else:
        connect(cpus=2)
    yield
    ray.shutdown()
