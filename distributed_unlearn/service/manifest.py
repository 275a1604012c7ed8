"""Texts that start rounds elsewhere: a systemd unit, and a Kubernetes CronJob that creates a KubeRay RayJob.

On Kubernetes the CronJob (Forbid) names every Job after its time; that time is the tick, so that a Job which is started
twice runs nothing twice. RayCronJob is not used: it is alpha, and has no policy against two at once.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.config.service import ServiceConfig
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.service.database import ledger_url

NAME = "erasure-rounds"
_CREATE = r"""set -eu
minutes=${JOB_NAME##*-}
tick=$(date -u -d "@$((minutes * 60))" +%Y%m%dT%H%M%SZ)
name=NAME-$minutes
if ! kubectl get rayjob "$name" >/dev/null 2>&1; then
  sed -e "s/TICK/$tick/" -e "s/RAYJOB/$name/" /manifest/rayjob.yaml | kubectl create -f -
fi
until status=$(kubectl get rayjob "$name" -o 'jsonpath={.status.jobDeploymentStatus}') \
  && case "$status" in Complete|Failed|ValidationFailed) true;; *) false;; esac; do sleep 15; done
[ "$status" = Complete ]
""".replace("NAME-", f"{NAME}-")


@dataclass(frozen=True)
class Images:
    """What the pods run, and the claim that holds the service's folder and file."""

    image: str
    """With this package, Ray and DeepSpeed."""
    kubectl: str
    """With `kubectl` and a shell."""
    claim: str
    mount: str = "/erasure"
    """Where the pods see the claim; every path of the service lies below."""


def systemd_unit(config: ServiceConfig, path: Path, overrides: Sequence[str] = ()) -> str:
    """A unit for `rounds schedule`; systemd restarts it, and it goes on where it was."""
    words = [sys.executable, "-m", "distributed_unlearn", "rounds", "schedule", str(path.absolute()), *overrides]
    command = " ".join(map(_unit_word, words))
    writable = {str(config.root.absolute())}
    url = ledger_url(config.ledger_url)
    if url.get_backend_name() == "sqlite":
        writable.add(str(Path(url.database or "").parent))
    return f"""[Unit]
Description=distributed-unlearn: rounds of erasure
Wants=network-online.target
After=network-online.target

[Service]
User=erasure
UMask=0077
WorkingDirectory={Path.cwd()}
ExecStart={command}
Restart=on-failure
RestartSec=60
# A pass rolls its round back when it is told to end.
KillMode=mixed
TimeoutStopSec=300
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ReadWritePaths={" ".join(sorted(writable))}

[Install]
WantedBy=multi-user.target
"""


def _unit_word(word: str) -> str:
    """A word of `ExecStart`, quoted where systemd would take it for something else."""
    if re.fullmatch(r"[\w./=:@,+-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def kubernetes_manifest(
    config: ServiceConfig, path: Path, cluster: ClusterConfig, images: Images, overrides: Sequence[str] = ()
) -> str:
    """YAML documents: service account, role, binding, the RayJob as a ConfigMap, and the CronJob.

    Raises:
        ConfigError: a path that the pods do not see, or a job that does not run on Ray.
    """
    named = {"service file": str(path), "folder": config.folder, "job": config.job, "key": config.key}
    for key, value in named.items():
        if not Path(value).is_relative_to(images.mount):
            raise ConfigError(
                f"{key} '{value}' in a manifest", f"a path below {images.mount}", "write it as the pods see it"
            )
    if cluster.backend != "ray":
        raise ConfigError("cluster.backend in_process in a manifest for KubeRay", "ray", "set cluster.backend: ray")
    documents = [*_access(), _config_map(path, cluster, images, overrides), _cron_job(config, images)]
    return yaml.safe_dump_all(documents, sort_keys=False)


def _access() -> list[dict[str, Any]]:
    rules = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]},
    ]
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": NAME}
    subject = {"kind": "ServiceAccount", "name": NAME}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": NAME},
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": NAME},
            "subjects": [subject],
            "roleRef": reference,
        },
    ]


def ray_job(path: Path, cluster: ClusterConfig, images: Images, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The RayJob of one tick; TICK and RAYJOB are filled in when it is created."""
    resources: dict[str, Any] = {"cpu": cluster.cpus_per_worker}
    if cluster.use_gpu != "never":
        resources["nvidia.com/gpu"] = 1
    command = ["distributed-unlearn", "rounds", "run-once", str(path), *overrides, "--tick", "TICK"]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "RAYJOB"},
        "spec": {
            "entrypoint": shlex.join(command),
            "jobId": "RAYJOB",
            "submissionMode": "K8sJobMode",
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "rayClusterSpec": {
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod("ray-head", images, {"cpu": 1}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "trainers",
                        "replicas": cluster.num_workers,
                        "minReplicas": cluster.num_workers,
                        "maxReplicas": cluster.num_workers,
                        "rayStartParams": {},
                        "template": _pod("ray-worker", images, resources),
                    }
                ],
            },
        },
    }


def _pod(name: str, images: Images, resources: dict[str, Any]) -> dict[str, Any]:
    return {
        "spec": {
            "containers": [
                {
                    "name": name,
                    "image": images.image,
                    "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
                    "resources": {"requests": resources, "limits": resources},
                    "volumeMounts": [{"name": "erasure", "mountPath": images.mount}],
                }
            ],
            "volumes": [{"name": "erasure", "persistentVolumeClaim": {"claimName": images.claim}}],
        }
    }


def _config_map(path: Path, cluster: ClusterConfig, images: Images, overrides: Sequence[str]) -> dict[str, Any]:
    text = yaml.safe_dump(ray_job(path, cluster, images, overrides), sort_keys=False)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}, "data": {"rayjob.yaml": text}}


def _cron_job(config: ServiceConfig, images: Images) -> dict[str, Any]:
    job_name = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    container = {
        "name": "create",
        "image": images.kubectl,
        "command": ["sh", "-c", _CREATE],
        "env": [{"name": "JOB_NAME", "valueFrom": job_name}],
        "volumeMounts": [{"name": "manifest", "mountPath": "/manifest"}],
    }
    pod = {
        "serviceAccountName": NAME,
        "restartPolicy": "OnFailure",
        "containers": [container],
        "volumes": [{"name": "manifest", "configMap": {"name": NAME}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": NAME},
        "spec": {
            "schedule": config.schedule.cron,
            "timeZone": config.schedule.timezone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "jobTemplate": {"spec": {"backoffLimit": 3, "template": {"spec": pod}}},
        },
    }
