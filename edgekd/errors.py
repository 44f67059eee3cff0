"""The exceptions that edgekd raises on purpose.

Every message says the value that was found, the limit it broke, and the remedy.

EdgekdError
├── RecipeError      a recipe, an option or a key in it
├── DataError        images, labels, folders, batches
├── ModelError       a model that cannot be built, loaded or captured
├── TargetError      a target that is unknown, or that cannot hold this network
├── TrainingError    training that cannot go on (a loss that is not finite)
├── StateError       a run folder or a saved network that does not fit
├── DeviceError      a device that cannot be reached, or lacks something
└── MissingPackageError  an optional package; names the extra that brings it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import get_args

from pydantic import BaseModel, ValidationError


class EdgekdError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class RecipeError(EdgekdError):
    """A recipe, an option, or a key in it."""


class DataError(EdgekdError):
    """Images, labels, folders, batches."""


class ModelError(EdgekdError):
    """A model that cannot be built, loaded or captured."""


class TargetError(EdgekdError):
    """A target that is unknown, or that cannot hold this network."""


class TrainingError(EdgekdError):
    """Training that cannot go on."""


class StateError(EdgekdError):
    """A run folder or a saved network that does not fit."""


class DeviceError(EdgekdError):
    """A device that cannot be reached, whose link was lost, or that lacks something."""


class MissingPackageError(EdgekdError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'edgekd[{extra}]'")


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of all names where none is near."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(names))}"


def describe_invalid(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each thing wrong, with its path and, for an unknown key, the nearest name."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if not path:  # of the whole: what was given would be all of it
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "extra_forbidden":
            known = _keys_at(model, item["loc"][:-1])
            lines.append(f"{path}: unknown key{nearest(str(item['loc'][-1]), known)}")
        else:
            given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
            lines.append(f"{path}: {item['msg']}{given}")
    return "; ".join(lines)


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that `model` takes at `path`."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index, or the tag of a union
        inner = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        model = next((a for a in inner if issubclass(a, BaseModel)), model)
    return list(model.model_fields)
