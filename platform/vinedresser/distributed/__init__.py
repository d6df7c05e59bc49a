"""One experiment on N workers -> Outcome. N = 1 runs in this process, without a worker group.

site.py says where, host.py trains, worker.py is one worker, group.py is Ray Train, failures.py is
what may be tried again, telling.py what workers tell. Importing imports no ray.
"""

from vinedresser.distributed.host import train
from vinedresser.distributed.resources import TRIAL_CPUS, num_groups, release_group, require
from vinedresser.distributed.site import Site
from vinedresser.distributed.worker import execute

__all__ = ["TRIAL_CPUS", "Site", "execute", "num_groups", "release_group", "require", "train"]
