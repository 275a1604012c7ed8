"""The cluster files against Ray's own schema (no cloud is called), its security rules, and every recipe in jobs/."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_unlearn.config import load_job

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster.yaml"
ON_PREMISES = ROOT / "cluster_on_premises.yaml"
FILES = (CLUSTER, ON_PREMISES)
TOKEN = "/home/ray/.ray/auth_token"
ENVIRONMENT = ("RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={TOKEN}", "RAY_USAGE_STATS_ENABLED=0")
RECIPES = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # before ray is imported, or it writes a token into the home folder
    from ray.autoscaler._private.util import prepare_config, validate_config

    # prepare_config fills the provider's defaults in, as `ray up` does; validate_config alone refuses good files.
    return lambda config: validate_config(prepare_config(copy.deepcopy(config)))


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    return loaded


def test_ray_accepts_the_file(validate, cluster):
    validate(cluster)


def _misspell_key(config: dict[str, Any]) -> None:
    config["file_mount"] = config.pop("file_mounts")


def _drop_head(config: dict[str, Any]) -> None:
    del config["head_node_type"]


def _name_unknown_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "heads"


def _use_fractional_cpu(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["resources"]["CPU"] = 0.5


@pytest.mark.parametrize("break_it", [_misspell_key, _drop_head, _name_unknown_head, _use_fractional_cpu])
def test_ray_refuses_a_broken_file(validate, cluster, break_it):
    break_it(cluster)
    with pytest.raises(Exception):  # noqa: B017 - ray raises jsonschema, ValueError and its own errors
        validate(cluster)


@pytest.fixture
def on_premises() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(ON_PREMISES.read_text(encoding="utf-8"))
    return loaded


def test_the_on_premises_file_is_accepted_and_its_gang_is_fixed(validate, on_premises):
    validate(on_premises)
    assert on_premises["min_workers"] == on_premises["max_workers"] == len(on_premises["provider"]["worker_ips"]) > 0
    (start,) = [command for command in on_premises["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0 --num-gpus=0" in start  # a local provider's head is an ordinary node otherwise


def _name_node_types(config: dict[str, Any]) -> None:
    config["available_node_types"] = {"gpu": {"resources": {}, "node_config": {}}}


@pytest.mark.parametrize("break_it", [_misspell_key, _name_node_types])
def test_ray_refuses_a_broken_on_premises_file(validate, on_premises, break_it):
    break_it(on_premises)
    with pytest.raises(Exception):  # noqa: B017 - ray raises jsonschema, ValueError and its own errors
        validate(on_premises)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_start_commands_use_the_token_and_loopback_and_report_nothing(path):
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    for role in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster[role] if "ray start" in command]
        assert len(starts) == 1
        assert re.match(r"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=\S+ RAY_USAGE_STATS_ENABLED=0;", starts[0]), (
            role
        )
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
    assert "--disable-usage-stats" in " ".join(cluster["head_start_ray_commands"])
    options = cluster["docker"]["run_options"]
    for setting in (
        "RAY_AUTH_MODE=token",
        "RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token",
        "RAY_USAGE_STATS_ENABLED=0",
    ):
        assert f"--env {setting}" in options
    assert "0.0.0.0" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_token_reaches_all_nodes_with_tight_permissions(path):
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert cluster["file_mounts"][TOKEN] == "~/.ray/auth_token"
    assert f"chmod 600 {TOKEN}" in " ".join(cluster["setup_commands"])


def test_gang_is_fixed_on_demand_and_off_the_head(cluster):
    gang = cluster["available_node_types"]["gpu"]
    assert gang["min_workers"] == gang["max_workers"] == cluster["max_workers"] > 0
    assert cluster["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert "," not in cluster["provider"]["availability_zone"]
    text = CLUSTER.read_text(encoding="utf-8")
    assert "InstanceMarketOptions" not in text and "ray-wheels" not in text and "nightly" not in text
    assert any(option.startswith("--shm-size=") for option in cluster["docker"]["run_options"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_image_has_the_pinned_ray(path):
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    constraints = ROOT / "constraints.txt"
    pinned = re.search(r"^ray(?:\[\w+\])?==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None, "constraints.txt does not pin ray"
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pinned.group(1)}-")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_valid_job(recipe):
    job = load_job(recipe, [])
    assert job.unlearns or job.train is not None
    assert job.output.startswith("runs/")


@pytest.mark.parametrize(
    "stem", ["smollm2_tofu", "smollm2_tofu_lora", "smollm2_ag_news", "digits_cnn", "digits_resnet18"]
)
def test_recipes_fit_together(stem):
    train, retrain, unlearn = (
        load_job(ROOT / "jobs" / f"{stem}_{name}.yaml", []) for name in ("train", "retrain", "unlearn")
    )
    assert train.data == retrain.data == unlearn.data and train.model == retrain.model
    assert train.model.trainable == unlearn.model.trainable and train.model.task == unlearn.model.task
    assert train.train is not None and retrain.train is not None
    assert retrain.train.exclude_forget and not train.train.exclude_forget
    assert retrain.train.model_copy(update={"exclude_forget": False}) == train.train
    assert train.holdout == retrain.holdout == unlearn.holdout
    assert retrain.forget == unlearn.forget
    assert unlearn.model.path.startswith(train.output + "/")
    assert unlearn.retrained is not None and unlearn.retrained.startswith(retrain.output + "/")
