"""The public API: everything imports, verbs stay verbs, and recipes speak their keywords."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd import errors, recipe
from edgekd.stages import distill, export, profile, quantize, verify

MODULES = [
    module.name
    for module in pkgutil.walk_packages(edgekd.__path__, "edgekd.")
    if not module.name.endswith("__main__")
]
# verb -> its positional parameters; all others are keywords
VERBS = {
    "distill": ["net"],
    "quantize": ["net"],
    "export": ["net"],
    "check": ["path"],
    "verify": ["artifact", "net"],
    "profile": ["artifact"],
    "run": ["recipe"],
}


def verb(name: str) -> Callable[..., Any]:
    """As a user reaches it, once every submodule has been imported."""
    for module in MODULES:
        importlib.import_module(module)
    function = getattr(edgekd, name)
    assert inspect.isfunction(function)
    return function


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_and_says_what_it_is(module):
    found = importlib.import_module(module)
    path = Path(found.__file__)
    assert path.is_relative_to(Path(edgekd.__file__).parent)
    if path.name != "__init__.py":
        assert found.__doc__


def test_every_source_file_is_a_module():
    folder = Path(edgekd.__file__).parent
    files = {p for p in folder.rglob("*.py") if p.name not in ("__init__.py", "__main__.py")}
    files -= set((folder / "runtimes" / "on_device").iterdir())  # for the device's own Python
    names = {".".join(p.relative_to(folder.parent).with_suffix("").parts) for p in files}
    assert names <= set(MODULES)  # a folder without __init__.py would be left out


def test_all_public_names_are_there_after_importing_everything():
    for module in MODULES:
        importlib.import_module(module)
    assert sorted(edgekd.__all__) == sorted(set(edgekd.__all__))
    for name in edgekd.__all__:
        assert not inspect.ismodule(getattr(edgekd, name)), name
    assert set(VERBS) <= set(edgekd.__all__)
    assert {"Recipe", "Target", "Network", "Data", "Task", "Artifact", "Check", "Parity",
            "Measurement", "Report", "QuantScheme", "IO"} <= set(edgekd.__all__)  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_takes_keywords_behind_what_it_works_on(name):
    parameters = inspect.signature(verb(name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == VERBS[name]
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)


@pytest.mark.parametrize("name", VERBS)
def test_no_module_at_the_top_hides_a_verb(name):
    folder = Path(edgekd.__file__).parent
    assert not (folder / f"{name}.py").exists()
    assert not (folder / name).exists()


@pytest.mark.parametrize(
    ("section", "function"),
    [
        (recipe.DistillSection, distill.distill),
        (recipe.QuantizeSection, quantize.quantize),
        (recipe.VerifySection, verify.verify),
        (recipe.ProfileSection, profile.profile),
    ],
)
def test_a_recipes_section_is_the_verbs_keywords(section, function):
    keywords = inspect.signature(function).parameters
    for name, field in section.model_fields.items():
        assert keywords[name].kind is inspect.Parameter.KEYWORD_ONLY
        if not field.is_required():  # the same with and without a recipe
            assert keywords[name].default == field.default, name


def test_export_is_the_verb_of_its_module():
    assert verb("export") is export.export


def test_every_error_is_of_one_tree():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)
               if issubclass(c, Exception) and c.__module__ == errors.__name__]  # fmt: skip
    assert len(classes) >= 8
    for error in classes:
        assert issubclass(error, edgekd.EdgekdError)
        assert error.__name__ in errors.__doc__
    assert str(errors.MissingPackageError("openvino", "openvino")) == (
        "openvino is not installed; run: pip install 'edgekd[openvino]'"
    )
