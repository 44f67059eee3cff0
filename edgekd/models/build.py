"""Models by name: our own families, torchvision, timm, or any `package.module:callable`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import nn

from edgekd.errors import MissingPackageError, ModelError, nearest
from edgekd.models.detector import detector, detector_space
from edgekd.models.resnet import resnet, resnet_space

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "edgekd/detector": detector,
    "edgekd/resnet": resnet,
}
# (a recipe's kwargs, side of the data's images) -> values of arguments to choose a student among
SPACES = {"edgekd/detector": detector_space, "edgekd/resnet": resnet_space}
# arguments that fetch weights: never repeated when a saved network is rebuilt
FETCHES = {"weights", "weights_backbone", "pretrained"}


class Build(BaseModel):
    """What rebuilds a module: a name and keyword arguments, plain values only."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    kwargs: dict[str, Any] = {}

    def without_fetching(self) -> Build:
        """The same architecture, without the arguments that fetch weights."""
        kept = {k: v for k, v in self.kwargs.items() if k not in FETCHES}
        return self.model_copy(update={"kwargs": kept})


def build_module(build: Build, *, trust: bool, origin: str) -> nn.Module:
    """Build the module that `build` names.

    Args:
        trust: whether a callable outside edgekd, torchvision and timm may run.
        origin: where the name was found, for messages.

    Raises:
        ModelError: unknown name, arguments that do not fit, or a callable that is not trusted.
    """
    name = build.model
    try:
        module = _factory(name, trust=trust, origin=origin)(**build.kwargs)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{origin}: {name} does not take {build.kwargs}: {error}") from None
    if not isinstance(module, nn.Module):
        raise ModelError(f"{origin}: {name} returned {type(module).__name__}, not an nn.Module")
    return module


def _factory(name: str, *, trust: bool, origin: str) -> Any:
    library, _, model = name.partition("/")
    if name in FAMILIES:
        return FAMILIES[name]
    if library == "torchvision" and model:
        from torchvision import models

        if model not in models.list_models():
            raise ModelError(f"{origin}: no model {name!r}{nearest(model, models.list_models())}")
        from edgekd.models.torchvision_detectors import build_core, is_detector

        build = build_core if is_detector(model) else models.get_model
        return lambda **kwargs: build(model, **kwargs)
    if library == "timm" and model:
        try:
            import timm
        except ImportError:
            raise MissingPackageError("timm", "timm") from None
        if not timm.is_model(model):
            raise ModelError(f"{origin}: no model {name!r}{nearest(model, timm.list_models())}")
        return lambda **kwargs: timm.create_model(model, **kwargs)
    if ":" in name:
        if not trust:
            raise ModelError(
                f"{origin} names the callable {name!r}; if you trust it, load with trust=True"
            )
        return import_callable(name, origin)
    raise ModelError(
        f"{origin}: no model {name!r}; use {', '.join(FAMILIES)}, torchvision/NAME, timm/NAME or "
        "package.module:callable"
    )


def source_sha256(build: Build) -> str | None:
    """SHA-256 of the file that defines a `package.module:callable`; None for other models.

    Of a `functools.partial`, the file of its function; of an object that is called, of its class.
    """
    if ":" not in build.model:
        return None
    found = import_callable(build.model, "model")
    while isinstance(found, functools.partial):
        found = found.func
    try:
        file = inspect.getsourcefile(
            found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
        )
    except TypeError:  # built into Python
        file = None
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def weights_sha256(path: Path) -> str:
    """SHA-256 of a file of weights.

    Raises:
        ModelError: no such file.
    """
    _check_exists(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"weights {path} do not exist")


def import_callable(name: str, origin: str) -> Any:
    """The object that `package.module:callable` names."""
    package, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"{origin}: {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ModelError(f"{origin}: {name!r} is a {type(found).__name__}, not a callable")
    return found


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict (`.safetensors`, or torch's file of tensors only) strictly into `module`.

    A file that holds `{"state_dict": …}` or `{"model": …}`, and names with a `module.`
    (DataParallel) or an `_orig_mod.` (torch.compile) in front, are understood.

    Raises:
        ModelError: no such file, an empty or a damaged one, one that would need pickle to run code,
            names and shapes that do not fit, or values that are not finite.
    """
    _check_exists(path)
    if not path.stat().st_size:
        raise ModelError(f"{path} is empty; copy or save the weights again")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than tensors; loading it would run code from the file. "
            "Save module.state_dict() instead, or convert it to .safetensors"
        ) from None
    except Exception as error:  # torch.load and safetensors raise a dozen unrelated types
        raise ModelError(f"{path} is damaged or not a checkpoint: {error}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, not a state dict")
    state = {str(name): tensor for name, tensor in state.items()}
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either may be around the other
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        said = _misfits(module.state_dict(), state) or " ".join(str(error).split())
        raise ModelError(
            f"{path} does not fit {type(module).__name__}: {said}; give the weights of this model, "
            "or the arguments that it was trained with"
        ) from None
    _check_finite(module, path)


def _misfits(own: dict[str, Any], state: dict[str, Any]) -> str:
    """The first names that do not fit, and how many there are; torch says all of them, in lines."""
    common = [name for name in own if isinstance(state.get(name), torch.Tensor)]
    kinds = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "no tensors": [name for name in own if name in state and name not in common],
        "of another shape": [
            f"{name}: {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in common
            if state[name].shape != own[name].shape
        ],
    }
    return ", ".join(f"{kind} {found[:3]} ({len(found)})" for kind, found in kinds.items() if found)


def _check_finite(module: nn.Module, path: Path) -> None:
    parameters = dict(module.named_parameters())  # a buffer may be a mask of -inf
    bad = [
        name for name, tensor in module.state_dict().items()
        if torch.isnan(tensor).any() or (name in parameters and torch.isinf(tensor).any())
    ]  # fmt: skip
    if bad:
        raise ModelError(
            f"{path} holds NaN or infinity in {bad[:3]} ({len(bad)}); give a checkpoint from before"
        )
