"""The way from a command line to a trainer can be read on one screen, and is the same for new and resumed runs."""

import ast
import dataclasses
import inspect
import textwrap
import typing

import pytest

from sorsa_ds.train import inputs, options, origin, settings, setup, trainer
from sorsa_ds.train.origin import NewRun, Origin, ResumedRun
from tests.helpers.projects import ROOT

LAUNCH = ROOT / "launch"
MODULES = (setup, settings, inputs)
LONGEST_STATION = 40


def tree_of(thing) -> ast.AST:
    """The syntax tree of a function or module."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def stations() -> list:
    """The functions that `assemble` calls, in order."""
    calls = [node for node in ast.walk(tree_of(setup.assemble)) if isinstance(node, ast.Call)]
    return [getattr(setup, call.func.id) for call in sorted(calls, key=lambda call: call.lineno)]


def test_the_way_passes_every_station_once_whatever_the_run_comes_from():
    """There is no branch in it, so that a new run and a resumed one pass the same stations."""
    *steps, last = tree_of(setup.assemble).body[0].body[1:]
    assert all(isinstance(step, ast.Assign) and isinstance(step.value, ast.Call) for step in steps)
    assert isinstance(last, ast.Return)
    assert [station.__name__ for station in stations()] == [
        "start_job", "find_origin", "resolve_settings", "hold_run", "read_inputs", "build_model", "resolve_rate",
        "build_engine", "build_trainer",
    ]  # fmt: skip


@pytest.mark.parametrize("station", stations(), ids=lambda station: station.__name__)
def test_a_station_fits_on_a_screen_and_returns_something_documented(station):
    assert len(inspect.getsource(station).splitlines()) <= LONGEST_STATION
    found = typing.get_type_hints(station)["return"]
    assert found.__doc__
    if found.__module__ in {module.__name__ for module in MODULES}:
        assert dataclasses.is_dataclass(found)
        assert found.__dataclass_params__.frozen


def test_new_and_resumed_runs_have_one_interface():
    public = {name for name in vars(Origin) if not name.startswith("_")}
    for kind in (NewRun, ResumedRun):
        own = {name for name in vars(kind) if not name.startswith("_")}
        assert own - {field.name for field in dataclasses.fields(kind)} == public
    for name in public:
        if inspect.isfunction(member := vars(Origin)[name]):
            for kind in (NewRun, ResumedRun):
                assert inspect.signature(vars(kind)[name]) == inspect.signature(member), name


TELLS_APART = ("resume", "origin", "initialisation", "base_loss")


def asked_in(tree: ast.AST) -> list[str]:
    """Everything in a syntax tree on which its way depends: conditions, operands of and/or, subjects of match."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            found.append(node.test)
        elif isinstance(node, ast.BoolOp):
            found.append(node)
        elif isinstance(node, ast.Match):
            found += [node.subject, *(case.guard for case in node.cases if case.guard)]
        elif isinstance(node, ast.comprehension):
            found += node.ifs
    return [ast.unparse(expression) for expression in found]


@pytest.mark.parametrize("module", [*MODULES, options, trainer], ids=lambda module: module.__name__)
def test_no_station_asks_whether_the_run_is_resumed(module):
    for asked in asked_in(tree_of(module)):
        assert not any(word in asked for word in TELLS_APART), asked


@pytest.mark.parametrize(
    "branch",
    ["if run.origin: go()", "run.origin and go()", "match origin:\n    case None: go()", "go() if resume else 0"],
)
def test_every_kind_of_branch_is_seen(branch):
    assert any(word in asked for asked in asked_in(ast.parse(branch)) for word in TELLS_APART)


def test_only_the_origin_tells_new_and_resumed_runs_apart():
    assert isinstance(origin.find_origin(None, None, None), NewRun)


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
def test_a_launch_script_only_calls_its_command(script):
    docstring, imported, guard = ast.parse(script.read_text()).body
    assert f"launch/{script.name} " in ast.literal_eval(docstring.value)
    assert ast.unparse(imported) == f"from sorsa_ds.cli.{script.stem} import main"
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    main()"
