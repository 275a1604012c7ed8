"""Reads a job file: YAML, `section.key=value` overrides, and every complaint of pydantic as one `ConfigError`.

Nothing here looks at the file system beyond the job file itself, or at the machine.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from distributed_unlearn.config.evaluate import EvaluateConfig
from distributed_unlearn.config.job import JobConfig
from distributed_unlearn.config.sections import ClusterConfig
from distributed_unlearn.config.solver import methods_with
from distributed_unlearn.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice where YAML itself silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or a mapping, which the loader itself refuses
            if key_node.value in seen:
                # Without the key, which stands where ids of people may stand.
                raise yaml.MarkedYAMLError(problem="a key that is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_UniqueKeyLoader)


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override '{dotted}'", f"'{parent}' to be a section", "check the path against the job file"
            )
    tree[leaf] = value


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> None:
    """Set `section.key=value` pairs in `tree`, values read as YAML.

    Raises:
        ConfigError: an override without `=`, a path through something that is no section, or bad YAML.
    """
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ConfigError(f"override '{override}'", "section.key=value", "write e.g. solver.max_steps=10")
        try:
            _set_dotted(tree, dotted, _load_yaml(text))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            # Without the value, which may hold ids of people.
            got = f"override '{dotted}=...' ({_problem(error)})"
            raise ConfigError(got, "a YAML value after '='", "quote the value") from error


def _problem(error: Exception) -> str:
    """What is wrong and in which line; yaml's own message quotes the line, which may hold ids of people."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"a value that cannot be read, {type(error).__name__}"  # e.g. a date with a 13th month
    line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
    return f"{line}{error.problem or type(error).__name__}"


def _shown(key: str) -> str:
    """A key on one line, and no longer than one."""
    text = key if key.isprintable() else ascii(key)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(kind: str, place: list[str]) -> str:
    """What to add about a key that its section does not have."""
    if kind != "extra_forbidden":
        return ""
    methods = methods_with(place[1]) if place[0] == "solver" and len(place) == 2 else ()
    return f"; it belongs to solver.method {', '.join(methods)}" if methods else "; this key does not exist"


def _refusal(error: ValidationError, source: str, root: str) -> ConfigError:
    """Every complaint of a validation as one error, with the dotted keys and without the values."""
    complaints = []
    for item in error.errors(include_url=False, include_input=False):
        place = [str(part) for part in item["loc"]]
        if place[:1] == ["solver"]:
            del place[1:2]  # the method: a part of the union, not of the key
        complaints.append(f"{_shown('.'.join(place) or root)}: {item['msg']}{_unknown(item['type'], place)}")
    return ConfigError(
        f"{len(complaints)} problem(s) in {source}: " + " | ".join(complaints),
        "settings as README.md describes them",
        "correct the named keys",
    )


def validated(kind: type[Settings], tree: dict[str, Any], source: str, root: str) -> Settings:
    """Nested dictionaries as a model.

    Raises:
        ConfigError: every complaint of the validation, with the dotted key; `source` and `root` are named in it.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _refusal(error, source, root) from error


def parse_job(tree: dict[str, Any], source: str) -> JobConfig:
    """Validate a job given as nested dictionaries.

    Raises:
        ConfigError: every complaint of the validation, with the dotted key.
    """
    return validated(JobConfig, tree, source, "job")


def parse_cluster(tree: dict[str, Any]) -> ClusterConfig:
    """Validate cluster settings given on the command line.

    Raises:
        ConfigError: every complaint of the validation.
    """
    return validated(ClusterConfig, tree, "the command line", "cluster")


def read_tree(path: Path, overrides: list[str], what: str) -> dict[str, Any]:
    """The YAML mapping in a file, with `section.key=value` overrides applied.

    Args:
        path: The file.
        overrides: See `apply_overrides`.
        what: Names the kind of file in errors, e.g. `job file`.

    Raises:
        ConfigError: a file that is missing or cannot be read, or bad YAML.
    """
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        got = f"{what} '{path}', which cannot be read ({error.strerror})"
        raise ConfigError(got, "an existing YAML file", "check the path and its permissions") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        got = f"'{path}', which is not YAML ({_problem(error)})"
        raise ConfigError(got, f"a YAML {what}", "correct the syntax") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path}' without sections", "a YAML mapping", f"see README.md for an example {what}")
    apply_overrides(tree, overrides)
    return tree


def load_job(path: Path, overrides: list[str]) -> JobConfig:
    """Read a job file, apply overrides, validate.

    Raises:
        ConfigError: a file that is missing or cannot be read, bad YAML, or a refused key or value.
    """
    return parse_job(read_tree(path, overrides, "job file"), str(path))


def parse_evaluation(tree: dict[str, Any], source: str) -> EvaluateConfig:
    """Validate an evaluation given as nested dictionaries.

    Raises:
        ConfigError: every complaint of the validation, with the dotted key.
    """
    return validated(EvaluateConfig, tree, source, "evaluation")


def load_evaluation(path: Path, overrides: list[str]) -> EvaluateConfig:
    """Read an evaluation file, apply overrides, validate.

    Raises:
        ConfigError: a file that is missing or cannot be read, bad YAML, or a refused key or value.
    """
    return parse_evaluation(read_tree(path, overrides, "evaluation file"), str(path))
