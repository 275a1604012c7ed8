"""The house's order enforced on every file: who imports whom, no cycles, file and function sizes, no print.

The rule is data (`FLOORS`, `RULES`, `OWNERS`);
`violations` checks one source text, so that snippets can prove it bites.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "distributed_unlearn"


@dataclass(frozen=True)
class UnitRule:
    """What one package (or top-level module) may import beside the standard library; None means no limit."""

    third_party: frozenset[str] | None = None
    internal: frozenset[str] | None = None
    forbidden_internal: frozenset[str] = frozenset()


def _only(*names: str) -> frozenset[str]:
    return frozenset(names)


FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("config", "records"),
    ("files", "logs", "provenance"),
    ("solvers", "curvature", "report"),
    ("models", "objectives"),
    ("data",),
    ("workers",),
    ("engine", "evaluation"),
    ("cluster", "rounds"),
    ("service",),
    ("commands",),
    ("demo",),
    ("cli",),
)
"""From the ground up: a unit imports from lower floors and from itself, never from its neighbours or from above."""
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
TOP_LEVEL = {"__main__": _only("cli"), "__init__": _only("config", "records", "errors", "files", "commands", "version")}
"""The package's own entrances: what each may reach."""
RULES: dict[str, UnitRule] = {
    "config": UnitRule(_only("pydantic", "yaml")),
    "errors": UnitRule(_only()),
    "records": UnitRule(_only()),
    "solvers": UnitRule(_only("torch", "numpy"), _only("records", "errors")),
    "curvature": UnitRule(_only("torch", "numpy", "greenlet"), _only("errors")),
    "objectives": UnitRule(_only("torch", "numpy"), _only("curvature", "errors", "config")),
    "report": UnitRule(internal=_only("records", "errors")),
    # handed an open worker group, they hold scalars and know neither the engine nor who opened it
    "rounds": UnitRule(forbidden_internal=_only("engine")),
    "service": UnitRule(forbidden_internal=_only("engine", "cluster")),
}
"""What a unit may import beyond the floors' rule; no limit where it is not named."""
# Who alone may import what; a dotted name covers everything below it.
OWNERS: dict[str, frozenset[str]] = {
    "deepspeed": _only("engine"),
    "torch.distributed": _only("engine"),
    "ray": _only("cluster"),
    "transformers": _only("models", "data", "engine", "demo", "cli"),
    f"{PACKAGE}.cli": _only("__main__"),
}
# The driver holds scalars: its files have no tensor to touch.
WITHOUT_TORCH = _only("rounds", "workers.group", "workers.client", "commands.run")


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return None if head is None else f"{head}.{node.attr}"
    return None


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    """Every absolute dotted name that `module` imports anywhere: lazily, under TYPE_CHECKING, by import_module too.

    `from a import b` yields `a` and `a.b`, since b may be a module. Uses of `torch.distributed` through an
    `import torch` count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and (_dotted(node.func) or "").split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.args[0].value
        elif isinstance(node, ast.Attribute) and (name := _dotted(node)) and _below(name, "torch.distributed"):
            yield name


def _unit(module: str) -> str:
    """`distributed_unlearn.solvers.cubic` -> `solvers`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _reaches(unit: str, target: str) -> bool:
    """Whether a file of `unit` may import the unit `target` at all."""
    if unit in TOP_LEVEL:
        return target in TOP_LEVEL[unit]
    return target == unit or target == "__init__" or FLOOR_OF.get(target, len(FLOORS)) < FLOOR_OF[unit]


def violations(module: str, source: str) -> list[str]:
    """What the file of dotted name `module` imports against the rule, one sentence each; empty when it obeys."""
    unit, inside = _unit(module), module.removeprefix(PACKAGE + ".")
    if unit not in FLOOR_OF and unit not in TOP_LEVEL:
        return [f"{module}: no floor for '{unit}'; add it to FLOORS in tests/test_import_rule.py"]
    rule, found = RULES.get(unit, UnitRule()), set()
    for name in imported_names(ast.parse(source), module):
        for owned, owners in OWNERS.items():
            if _below(name, owned) and not any(_below(inside, owner) for owner in owners):
                found.add(f"{module} imports {owned}; only {', '.join(sorted(owners))} may")
        root = name.split(".")[0]
        if root == "torch" and any(_below(inside, driver) for driver in WITHOUT_TORCH):
            found.add(f"{module} imports torch; the driver touches no tensor")
        if root == PACKAGE:
            target = _unit(name)
            if target.startswith("__"):  # the version, the entrance itself
                continue
            if not _reaches(unit, target) or target in rule.forbidden_internal:
                found.add(f"{module} imports {name}; {unit} must not")
            elif rule.internal is not None and target != unit and target not in rule.internal:
                found.add(f"{module} imports {name}; {unit} may import only {', '.join(sorted(rule.internal))}")
        elif root not in sys.stdlib_module_names and rule.third_party is not None and root not in rule.third_party:
            found.add(f"{module} imports {root}; {unit} may import only {', '.join(sorted(rule.third_party))}")
    return sorted(found)


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file; a package's `__init__.py` has the package's name."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of `sources` that it imports, lazily or not; the most specific existing module of each name."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = set(imported_names(ast.parse(source), module))
        specific = {name for name in names if not any(other != name and _below(other, name) for other in names)}
        targets = {name if name in sources else name.rpartition(".")[0] for name in specific}
        graph[module] = {target for target in targets if target in sources and target != module}
    return graph


def style_violations(path: str, source: str, in_package: bool) -> list[str]:
    """Files of 400 lines and more, functions of 60 and more, `print` calls in the package, files named utils."""
    found = []
    num_lines = source.count("\n") + 1
    if num_lines > 400:
        found.append(f"{path}: {num_lines} lines, 400 at most")
    if Path(path).name in ("utils.py", "util.py", "helpers.py"):
        found.append(f"{path}: name the file after what it does")
    if not in_package:
        return found
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= 60:
                found.append(f"{path}:{node.lineno}: function {node.name} has {length} lines, fewer than 60 wanted")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{path}:{node.lineno}: print; use the logger or the console")
    return found


ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SOURCES = {module_name(path, ROOT): path.read_text(encoding="utf-8") for path in FILES}
OTHERS = [path for folder in ("tests", "jobs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
PURE = ("config", "errors", "records", "solvers", "curvature", "objectives")


def _find_cycle(sources: dict[str, str]) -> list[str]:
    try:
        graphlib.TopologicalSorter(import_graph(sources)).prepare()
    except graphlib.CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def test_there_is_something_to_check():
    assert len(FILES) > 10
    assert {f"{PACKAGE}.config", f"{PACKAGE}.solvers.protocols"} <= SOURCES.keys()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_module_obeys_the_import_rule(module):
    assert violations(module, SOURCES[module]) == []


def test_no_import_cycles_lazy_ones_included():
    assert _find_cycle(SOURCES) == []


@pytest.mark.parametrize("path", [*FILES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_file_obeys_the_style_rule(path):
    name = str(path.relative_to(ROOT))
    assert style_violations(name, path.read_text(encoding="utf-8"), in_package=name.startswith(PACKAGE)) == []


@pytest.mark.parametrize("unit", PURE)
def test_pure_unit_loads_nothing_heavy_in_a_fresh_interpreter(unit):
    modules = [name for name in SOURCES if name.split(".")[1:2] == [unit]]
    unwanted = {"deepspeed", "ray", "accelerate", "datasets", "rich", "matplotlib"}
    if unit in ("config", "errors", "records"):
        unwanted |= {"torch", "numpy"}
    if unit in ("solvers", "objectives"):
        unwanted.add("transformers")
    unwanted |= {f"{PACKAGE}.{other}" for other in ("engine", "cluster", "data", "rounds", "report", "cli")}
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"sys.stdout.write(' '.join(sorted(set({sorted(unwanted)!r}) & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("solvers.bad", "import deepspeed", "only engine may"),
        ("solvers.bad", "def f():\n    import scipy", "solvers may import only"),
        ("solvers.bad", "from distributed_unlearn.curvature import segments", "solvers must not"),
        ("solvers.bad", "from distributed_unlearn import config", "solvers may import only"),
        ("files", "from distributed_unlearn.solvers import cubic", "files must not"),
        ("objectives.bad", "from distributed_unlearn.models import processor", "objectives must not"),
        ("solvers.bad", "from ..engine import partitions", "solvers must not"),
        ("solvers.bad", "import transformers", "imports transformers"),
        ("cluster.bad", "import torch.distributed as dist", "imports torch.distributed; only engine"),
        ("cluster.bad", "from torch import distributed", "imports torch.distributed; only engine"),
        ("rounds.bad", "import torch\ntorch.distributed.barrier()", "imports torch.distributed; only engine"),
        ("engine.bad", "import importlib\nimportlib.import_module('ray')", "imports ray; only cluster"),
        ("engine.bad", "from ray.util import placement_group", "imports ray; only cluster"),
        ("curvature.bad", "from distributed_unlearn.solvers import cubic", "curvature must not"),
        ("curvature.bad", "from transformers import AutoConfig", "imports transformers"),
        ("objectives.bad", "from distributed_unlearn.engine import partitions", "objectives must not"),
        ("data.bad", "from distributed_unlearn.rounds import round", "data must not"),
        ("evaluation.bad", "from distributed_unlearn import cluster", "evaluation must not"),
        ("provenance", "import distributed_unlearn.cluster.worker", "provenance must not"),
        ("rounds.bad", "from distributed_unlearn.cluster import open", "rounds must not"),
        ("rounds.bad", "from distributed_unlearn.engine import oracle", "rounds must not"),
        ("commands.bad", "from distributed_unlearn.demo import people", "commands must not"),
        ("report.bad", "from distributed_unlearn.solvers.solution import Result", "report must not"),
        ("rounds.bad", "from distributed_unlearn.cli import main", "imports distributed_unlearn.cli"),
        ("config", "import numpy", "config may import only"),
        ("records", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "records may import only"),
        ("rounds.round", "import torch", "the driver touches no tensor"),
        ("novel", "", "no floor for 'novel'"),
    ],
)
def test_violating_snippets_are_caught(module, source, complaint):
    assert any(complaint in sentence for sentence in violations(f"{PACKAGE}.{module}", source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("solvers.good", "import math\nimport torch\nfrom distributed_unlearn.records import StepRecord"),
        ("solvers.good", "import torch.func\nfrom . import protocols\nfrom .cubic import solve"),
        ("objectives.good", "from distributed_unlearn.config import ObjectiveConfig"),
        ("engine.good", "import deepspeed\nimport torch.distributed as dist\nimport transformers"),
        ("cluster.good", "import ray\nfrom distributed_unlearn.engine import model"),
        ("__main__", "from distributed_unlearn.cli import main"),
        ("rounds.good", "from distributed_unlearn.workers.group import WorkerGroup"),
        ("engine.good", "from distributed_unlearn import __version__"),
    ],
)
def test_obedient_snippets_pass(module, source):
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_cycles_are_caught_lazy_ones_included():
    a, b, c = (f"{PACKAGE}.rounds.{name}" for name in "abc")
    straight = {a: f"import {b}", b: f"from {PACKAGE}.rounds import c", c: ""}
    assert _find_cycle(straight) == []
    assert set(_find_cycle({**straight, c: f"def f():\n    from {a} import g"})) == {a, b, c}


def test_style_violations_are_caught():
    long_function = "def f():\n" + "    x = 1\n" * 59
    assert len(style_violations("p/a.py", long_function, True)) == 1
    assert style_violations("p/a.py", "def f():\n" + "    x = 1\n" * 58, True) == []
    assert len(style_violations("p/a.py", "x = 1\n" * 400, True)) == 1
    assert len(style_violations("p/a.py", "print('x')", True)) == 1
    assert style_violations("tests/a.py", "print('x')", False) == []
    assert len(style_violations("p/utils.py", "", True)) == 1


def test_every_rule_names_something_known():
    for unit, rule in RULES.items():
        assert unit in FLOOR_OF
        for name in (rule.internal or frozenset()) | rule.forbidden_internal:
            assert name in FLOOR_OF
