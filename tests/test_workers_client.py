"""The typed calls: each reaches a method that the worker has, with arguments that it takes, and checks the answer."""

import ast
import inspect
from pathlib import Path
from typing import get_type_hints

import pytest

from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.workers.client import Workers

ROOT = Path(__file__).resolve().parents[1] / "distributed_unlearn"


def _answer(name: str) -> object:
    """Something of the type that the call says it returns."""
    kind = get_type_hints(getattr(Workers, name))["return"]
    plain = {type(None): None, int: 5, float: 1.0, list[bool]: True, list[str]: "a"}
    return plain[kind] if kind in plain else object.__new__(kind)


class Recorder:
    """A group of two that answers what it is given and notes what it was asked."""

    world_size = 2

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def call_all(self, method, *arguments):
        self.calls.append((method, arguments))
        return [self.answers.get(method)] * 2

    def call_rank_zero(self, method, *arguments):
        return self.call_all(method, *arguments)[0]

    def share(self, value):
        return value


class Given:
    """An argument; as a corpus, one that has no ids to take away."""

    def without_ids(self):
        return self


def _calls() -> list[str]:
    return [name for name, value in vars(Workers).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", _calls())
def test_every_call_reaches_a_method_of_the_worker(name):
    group = Recorder({name: _answer(name)})
    call = getattr(Workers(group), name)
    given = [Given() for _ in inspect.signature(call).parameters]
    answer = call(*given)
    ((method, arguments),) = group.calls
    assert method == name and list(arguments) == given
    wanted = [key for key in inspect.signature(getattr(Worker, method)).parameters if key != "self"]
    assert wanted == list(inspect.signature(call).parameters)
    assert answer is group.answers[name] or answer == [group.answers[name]] * 2


def test_an_answer_of_another_kind_is_found_out():
    with pytest.raises(AssertionError, match="open_model answered str"):
        Workers(Recorder({"open_model": "a model"})).open_model(None, "float32", 3)


@pytest.mark.parametrize("folder", ["rounds", "commands", "demo", "evaluation", "service", "workers"])
def test_no_method_is_named_as_a_string_outside_the_client(folder):
    untyped = ("call_all", "call_rank_zero")
    for path in sorted({*(ROOT / folder).rglob("*.py")} - {ROOT / "workers" / "client.py"}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr in untyped), path
