"""Manifests for Kubernetes and KubeRay: a schedule as CronJob, RayJob or RayCronJob.

Pods run without root and without privileges, read secrets from a Secret by reference, accept
connections from their own kind only, and have time for a checkpoint before they are ended.
"""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt

from vinedresser.config import Section
from vinedresser.errors import ConfigError

Manifest = dict[str, Any]

# Exit codes after which a repetition cannot succeed: wrong input, failed training.
FINAL_CODES = [2, 4]
_RETRIED_CODES = [3, 75, 137]
# Back-offs of Kubernetes double from 10 s to minutes: together longer than those of a schedule.
_MAX_RETRIES = 12

# Between SIGTERM and SIGKILL of a pod. Ray announces the loss of its node for a part of it, in
# which runs write checkpoints.
GRACE_SECONDS = 120
_DRAIN_SECONDS = 90
_USER = 1000
# A name of Kubernetes, with room for what CronJob and RayJob append.
_MAX_NAME = 40
_NAME = r"^[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?$"


@dataclass(frozen=True)
class Tick:
    """The call of one schedule, and the times of its slots.

    Attributes:
        name: name of the schedule.
        source: import path or file of the schedule.
        workspace: absolute path.
        every: five fields of cron, or the time between slots.
        zone: time zone of the fields.
        deadline: seconds of one run.
        late: seconds after a slot in which it may still begin.
        environment: variables, without secrets.
    """

    name: str
    source: str
    workspace: str
    every: str | timedelta
    zone: str = "UTC"
    deadline: int = 8 * 3600
    late: int = 12 * 3600
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments of `vinedresser`."""
        return ("schedule", "tick", self.source, "--workspace", self.workspace, "--exit-code")

    @property
    def cron(self) -> str:
        """The times of the slots as a cron expression; see `cron_of`."""
        return self.every if isinstance(self.every, str) else cron_of(self.every)

    @property
    def resource(self) -> str:
        """The name as Kubernetes and systemd accept it."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:_MAX_NAME].strip("-")


class Pods(Section):
    """The pods of a schedule."""

    # Container image with vinedresser, see deploy/.
    image: Annotated[str, Field(pattern=r"^\S+$")]
    namespace: Annotated[str, Field(pattern=_NAME)] = "default"
    # PersistentVolumeClaim with access mode ReadWriteMany; it holds the workspace.
    claim: Annotated[str, Field(pattern=_NAME)] = "vinedresser-workspace"
    # Secret whose keys become variables: tracking server, webhooks, object storage.
    secret: Annotated[str, Field(pattern=_NAME)] = "vinedresser"  # noqa: S105 - a name
    # Largest numbers of Ray workers: CPU pods, and pods with one GPU on spot machines.
    cpu_pods: NonNegativeInt = 4
    gpu_pods: NonNegativeInt = 8
    # Label of spot machines; Google: cloud.google.com/gke-spot=true.
    spot: Annotated[str, Field(pattern=r"^[\w./-]+=[\w.-]+$")] = "karpenter.sh/capacity-type=spot"


def cron_of(interval: timedelta) -> str:
    """Return the cron expression, in UTC, of an interval that divides an hour or a day.

    Raises:
        ConfigError: it divides neither.
    """
    minutes, rest = divmod(int(interval.total_seconds()), 60)
    if rest == 0 and minutes:
        if 60 % minutes == 0:
            return f"*/{minutes} * * * *" if minutes < 60 else "0 * * * *"
        if 1440 % minutes == 0 and minutes % 60 == 0:
            return f"0 */{minutes // 60} * * *" if minutes < 1440 else "0 0 * * *"
    raise ConfigError(
        f"interval {interval}: no cron expression; expected a part of an hour or a day, as 15m or "
        "6h, or use the target cron or systemd, which read the interval itself"
    )


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """Return manifests as one YAML file."""
    import yaml

    return str(yaml.safe_dump_all(manifests, sort_keys=False, width=100))


def cron_job(tick: Tick, pods: Pods) -> list[Manifest]:
    """Return a CronJob whose pod runs the pipeline, and its network policy."""
    codes = {"containerName": "tick", "operator": "In"}
    pod = _pod(tick, pods, "tick", {"cpu": "2", "memory": "8Gi"})
    # The entry point of the image is tini, which reaps what killed processes leave.
    pod["containers"][0]["args"] = ["vinedresser", *tick.words]
    pod = {"restartPolicy": "Never", "automountServiceAccountToken": False, **pod}
    job = {
        # Retries included; the deadline of one run is the schedule's.
        "activeDeadlineSeconds": tick.deadline * 2,
        "backoffLimit": _MAX_RETRIES,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {**codes, "values": FINAL_CODES}},
                # An evicted pod is no failure of the pipeline.
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "Count", "onExitCodes": {**codes, "values": _RETRIED_CODES}},
            ]
        },
        "ttlSecondsAfterFinished": 7 * 86400,
        "template": {"metadata": {"labels": _labels(tick)}, "spec": pod},
    }
    spec = {
        "schedule": tick.cron,
        "timeZone": tick.zone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": tick.late,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }
    return [
        _object("batch/v1", "CronJob", tick, pods, spec),
        _object("networking.k8s.io/v1", "NetworkPolicy", tick, pods, _closed(tick, [])),
    ]


def ray_job(tick: Tick, pods: Pods) -> list[Manifest]:
    """Return a RayJob for one tick on a new cluster, its network policy and its monitor."""
    return [
        _object("ray.io/v1", "RayJob", tick, pods, _ray_job_spec(tick, pods)),
        *_around_ray(tick, pods),
    ]


def ray_cron_job(tick: Tick, pods: Pods) -> list[Manifest]:
    """Return a RayCronJob, its network policy and its monitor.

    It has neither an overlap policy nor a starting deadline: the tick does without them.
    """
    spec = {
        "schedule": tick.cron,
        "timeZone": tick.zone,
        "jobTemplate": _ray_job_spec(tick, pods),
    }
    return [_object("ray.io/v1", "RayCronJob", tick, pods, spec), *_around_ray(tick, pods)]


def _ray_job_spec(tick: Tick, pods: Pods) -> Manifest:
    key, _, value = pods.spot.partition("=")
    labels = {"metadata": {"labels": _labels(tick)}}
    head = _ray_pod(tick, pods, "ray-head", {"cpu": "2", "memory": "8Gi"})
    size = {"cpu": "4", "memory": "16Gi"}
    cpu = _ray_pod(tick, pods, "ray-worker", size)
    gpu = _ray_pod(tick, pods, "ray-worker", {**size, "nvidia.com/gpu": "1"})
    gpu["nodeSelector"] = {key: value}
    gpu["tolerations"] = [
        {"key": name, "operator": "Exists", "effect": "NoSchedule"}
        for name in ("nvidia.com/gpu", key)
    ]
    submitter = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        **_pod(tick, pods, "ray-job-submitter", {"cpu": "500m", "memory": "1Gi"}),
    }
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_DRAIN_SECONDS)}
    return {
        "entrypoint": shlex.join(["vinedresser", *tick.words]),
        "runtimeEnvYAML": json.dumps({"env_vars": environment}),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "activeDeadlineSeconds": tick.deadline * 2,
        "backoffLimit": 2,
        "submitterPodTemplate": {**labels, "spec": submitter},
        "rayClusterSpec": {
            "rayVersion": importlib.metadata.version("ray"),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 300},
            "headGroupSpec": {
                # The head coordinates; work goes to the workers.
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
                "template": {**labels, "spec": head},
            },
            "workerGroupSpecs": [
                {
                    "groupName": name,
                    "replicas": 0,
                    "minReplicas": 0,
                    "maxReplicas": most,
                    "rayStartParams": {},
                    "template": {**labels, "spec": pod},
                }
                for name, most, pod in (
                    ("cpu", pods.cpu_pods, cpu),
                    ("gpu-spot", pods.gpu_pods, gpu),
                )
            ],
        },
    }


def _around_ray(tick: Tick, pods: Pods) -> list[Manifest]:
    """Return the network policy and the monitor of a Ray cluster."""
    operator = {
        "from": [
            {
                "namespaceSelector": {},
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
            }
        ],
        "ports": [{"protocol": "TCP", "port": 8265}],
    }
    prometheus = {
        "from": [
            {
                "namespaceSelector": {},
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
            }
        ],
        "ports": [{"protocol": "TCP", "port": 8080}],
    }
    own = {"from": [{"podSelector": {"matchLabels": _labels(tick)}}]}
    monitor = {
        "selector": {"matchLabels": _labels(tick)},
        "podMetricsEndpoints": [{"port": "metrics", "interval": "30s"}],
    }
    policy = _closed(tick, [own, operator, prometheus])
    return [
        _object("networking.k8s.io/v1", "NetworkPolicy", tick, pods, policy),
        _object("monitoring.coreos.com/v1", "PodMonitor", tick, pods, monitor),
    ]


def _labels(tick: Tick) -> dict[str, str]:
    return {"app.kubernetes.io/name": "vinedresser", "app.kubernetes.io/instance": tick.resource}


def _object(version: str, kind: str, tick: Tick, pods: Pods, spec: Manifest) -> Manifest:
    name = f"vinedresser-{tick.resource}"
    metadata = {"name": name, "namespace": pods.namespace, "labels": _labels(tick)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _closed(tick: Tick, ingress: list[Manifest]) -> Manifest:
    """Return the policy that lets only listed connections in."""
    pods = {"matchLabels": _labels(tick)}
    return {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress}


def _pod(tick: Tick, pods: Pods, name: str, resources: Mapping[str, str]) -> Manifest:
    """Return a pod with one container: not root, with the workspace and a large /dev/shm."""
    environment = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAIN_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
        **tick.environment,
    }
    mounts = {"workspace": tick.workspace, "shm": "/dev/shm"}  # noqa: S108
    container: Manifest = {
        "name": name,
        "image": pods.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "envFrom": [{"secretRef": {"name": pods.secret, "optional": True}}],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": key, "mountPath": path} for key, path in mounts.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }


def _ray_pod(tick: Tick, pods: Pods, name: str, resources: Mapping[str, str]) -> Manifest:
    """Return a pod of a Ray cluster, whose command KubeRay writes."""
    pod = _pod(tick, pods, name, resources)
    pod["containers"][0]["ports"] = [{"name": "metrics", "containerPort": 8080}]
    # `ray start` becomes the first process and reaps no orphans; the pause container does.
    return {"restartPolicy": "Never", "shareProcessNamespace": True, **pod}
