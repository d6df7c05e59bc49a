"""The demo's chain each night at three: `vinedresser schedule serve pipelines.nightly`.

A schedule names its pipeline, so that looking at times and files imports no torch.
"""

from vinedresser.schedule.definition import Schedule

SCHEDULE = Schedule(
    name="nightly", pipeline="pipelines.demo", every="0 3 * * *", zone="Europe/Berlin"
)
