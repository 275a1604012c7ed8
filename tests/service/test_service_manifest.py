"""The unit and the manifests: complete, with the fields that their readers need, and a tick that shell makes right."""

import os
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.config.service import ScheduleConfig, ServiceConfig
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.service.manifest import NAME, Images, kubernetes_manifest, systemd_unit
from distributed_unlearn.service.schedule import parse_tick
from tests.cli.command_line import assert_refused, call, succeed
from tests.service.fake_round import make_service

IMAGES = Images("registry.example/unlearn:1", "registry.example/kubectl:1", "erasure-claim")


def _config(**changes) -> ServiceConfig:
    paths = {"folder": "/erasure/service", "job": "/erasure/job.yaml", "key": "/erasure/operator.key"}
    return ServiceConfig(
        **{**paths, "schedule": ScheduleConfig(cron="0 3 * * mon", timezone="Europe/Berlin"), **changes}
    )


def _documents() -> dict[str, dict]:
    text = kubernetes_manifest(_config(), Path("/erasure/service.yaml"), ClusterConfig(num_workers=4), IMAGES)
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_the_cron_job_never_runs_two_and_may_only_create_ray_jobs():
    found = _documents()
    spec = found["CronJob"]["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 3 * * mon", "Europe/Berlin", "Forbid")
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"] == NAME
    assert pod["restartPolicy"] in ("OnFailure", "Never"), "what a Job allows"
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert found["Role"]["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]


def test_the_ray_job_is_a_gang_with_a_token_that_is_tried_once():
    job = yaml.safe_load(_documents()["ConfigMap"]["data"]["rayjob.yaml"])
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["entrypoint"] == "distributed-unlearn rounds run-once /erasure/service.yaml --tick TICK"
    assert spec["backoffLimit"] == 0 and spec["shutdownAfterJobFinishes"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = pod["spec"]["containers"]
        assert container["volumeMounts"][0]["name"] == pod["spec"]["volumes"][0]["name"]


def _object(required: tuple[str, ...], **properties: object) -> dict:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_TEXT, _COUNT, _YES_NO = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITIES = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
_CONTAINER = _object(
    ("name", "image"),
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=_TEXT,
    env={"type": "array", "items": _object(("name",), name=_TEXT, value={"type": "string"})},
    resources=_object((), requests=_QUANTITIES, limits=_QUANTITIES),
    volumeMounts={"type": "array", "items": _object(("name", "mountPath"), name=_TEXT, mountPath=_TEXT)},
)
_VOLUME = _object(("name",), name=_TEXT, persistentVolumeClaim=_object(("claimName",), claimName=_TEXT))
_POD = _object(
    ("spec",),
    spec=_object(
        ("containers",),
        containers={"type": "array", "minItems": 1, "items": _CONTAINER},
        volumes={"type": "array", "items": _VOLUME},
    ),
)
_GROUP = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    **{"groupName": _TEXT, "replicas": _COUNT, "minReplicas": _COUNT, "maxReplicas": _COUNT},
    **{"rayStartParams": _TEXTS, "template": _POD},
)
_CLUSTER = _object(
    ("headGroupSpec",),
    authOptions=_object((), mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_object(("template",), rayStartParams=_TEXTS, template=_POD),
    workerGroupSpecs={"type": "array", "items": _GROUP},
)
RAY_JOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object(("name",), name={"type": "string", "maxLength": 47}),
    spec=_object(
        (),
        **{"entrypoint": _TEXT, "jobId": _TEXT, "rayClusterSpec": _CLUSTER},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        **{"backoffLimit": _COUNT, "shutdownAfterJobFinishes": _YES_NO, "ttlSecondsAfterFinished": _COUNT},
    ),
)
"""What KubeRay's API reference (ray.io/v1, with authOptions: 1.5.1 and newer) says of the fields that are used here. A
field that is not named here is refused, so that a misspelt one, which the API server would silently drop, shows."""


@pytest.mark.parametrize("use_gpu", ["auto", "never"])
def test_the_ray_job_is_as_the_published_api_has_it(use_gpu):
    cluster = ClusterConfig(num_workers=4, use_gpu=use_gpu)
    text = kubernetes_manifest(_config(), Path("/erasure/service.yaml"), cluster, IMAGES)
    (config_map,) = [part for part in yaml.safe_load_all(text) if part["kind"] == "ConfigMap"]
    job = yaml.safe_load(config_map["data"]["rayjob.yaml"])
    named = {**job, "metadata": {"name": f"{NAME}-29412180"}}
    jsonschema.validate(named, RAY_JOB)
    for broken in (
        {**named, "metadata": {"name": "x" * 48}},
        {**named, "spec": {**job["spec"], "entryPoint": "misspelt"}},
        {**named, "spec": {**job["spec"], "backoffLimit": "0"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, RAY_JOB)


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_the_script_makes_the_tick_of_the_jobs_name_and_creates_it_once(tmp_path):
    script = _documents()["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *jsonpath*) cat {tmp_path}/status;;\n'
        f"  get*) test -f {tmp_path}/created;;\n"
        f"  create*) cat >> {tmp_path}/created;; esac\n"
    )
    kubectl.chmod(0o755)
    (tmp_path / "rayjob.yaml").write_text(_documents()["ConfigMap"]["data"]["rayjob.yaml"])
    script = script.replace("/manifest/", f"{tmp_path}/")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_NAME": f"{NAME}-29412180"}
    codes = []
    for status in ("Complete", "Complete", "Failed", "ValidationFailed"):
        (tmp_path / "status").write_text(status)
        codes.append(subprocess.run(["sh", "-c", script], env=environment, timeout=30).returncode)
    assert codes == [0, 0, 1, 1]
    (created,) = yaml.safe_load_all((tmp_path / "created").read_text())
    assert created["metadata"]["name"] == f"{NAME}-29412180" == created["spec"]["jobId"]
    tick = created["spec"]["entrypoint"].split()[-1]
    assert parse_tick(tick).timestamp() == 29412180 * 60


@pytest.mark.parametrize("change", [{"folder": "service"}, {"job": "/elsewhere/job.yaml"}, {"key": "operator.key"}])
def test_paths_that_the_pods_do_not_see_are_refused(change):
    with pytest.raises(ConfigError, match="below /erasure"):
        kubernetes_manifest(_config(**change), Path("/erasure/service.yaml"), ClusterConfig(), IMAGES)
    with pytest.raises(ConfigError, match="in_process"):
        alone = ClusterConfig(backend="in_process", num_workers=1)
        kubernetes_manifest(_config(), Path("/erasure/service.yaml"), alone, IMAGES)


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    text = systemd_unit(_config(folder=str(tmp_path)), tmp_path / "service.yaml")
    assert f"ReadWritePaths={tmp_path}\n" in text and "KillMode=mixed" in text
    (start,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert start.endswith(f"-m distributed_unlearn rounds schedule {tmp_path}/service.yaml")
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here: the unit was only looked at")
    unit = tmp_path / "erasure.service"
    unit.write_text(text.replace("User=erasure", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_overrides_are_in_the_commands_and_an_sqlite_url_is_writable(tmp_path):
    config = _config(folder=str(tmp_path), ledger=f"sqlite:///{tmp_path}/db/ledger.db")
    text = systemd_unit(config, tmp_path / "service.yaml", ["schedule.cron=0 3 * * mon", "overrides=[a%b$]"])
    assert text.count(f"ReadWritePaths={tmp_path} {tmp_path}/db\n") == 1
    assert '/service.yaml "schedule.cron=0 3 * * mon" "overrides=[a%%b$$]"\n' in text
    arguments = (Path("/erasure/service.yaml"), ClusterConfig(), IMAGES, ["gates.forgotten=partly forgotten"])
    documents = {part["kind"]: part for part in yaml.safe_load_all(kubernetes_manifest(_config(), *arguments))}
    entrypoint = yaml.safe_load(documents["ConfigMap"]["data"]["rayjob.yaml"])["spec"]["entrypoint"]
    assert "service.yaml 'gates.forgotten=partly forgotten' --tick TICK" in entrypoint


def test_the_command_prints_them(capsys, tmp_path):
    path = make_service(tmp_path)
    assert "[Service]" in succeed(capsys, ["rounds", "manifest", str(path), "--kind", "systemd"]).out
    refused = call(capsys, ["rounds", "manifest", str(path), "--kind", "kubernetes"])
    assert_refused(refused, 3, "configuration", "--image")
    arguments = ["rounds", "manifest", str(path), "--kind", "kubernetes", "--image", "i", "--claim", "c"]
    arguments += ["--kubectl-image", "k"]
    assert_refused(call(capsys, arguments), 3, "configuration", "below /erasure")
