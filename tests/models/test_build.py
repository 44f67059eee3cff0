"""Models by name, and weights from files."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekd.errors import ModelError
from edgekd.models.build import Build, build_module, load_weights, source_sha256
from edgekd.models.resnet import ResNet, resnet


def built(model: str, *, trust: bool = False, **kwargs: Any) -> nn.Module:
    return build_module(Build(model=model, kwargs=kwargs), trust=trust, origin="here")


def test_our_own_family():
    assert isinstance(built("edgekd/resnet", num_classes=4), ResNet)


def test_a_model_of_torchvision():
    module = built("torchvision/squeezenet1_1", num_classes=4)
    assert module(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_a_model_of_timm():
    pytest.importorskip("timm")
    module = built("timm/resnet10t", num_classes=4)
    assert module.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_callable_runs_only_when_trusted():
    with pytest.raises(
        ModelError, match=r"here names the callable 'torch\.nn:Linear'; if you trust it"
    ):
        built("torch.nn:Linear", in_features=3, out_features=2)
    module = built("torch.nn:Linear", trust=True, in_features=3, out_features=2)
    assert isinstance(module, nn.Linear)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("torchvision/resnet81", {}, "no model 'torchvision/resnet81'; did you mean"),
        ("nothing", {}, "no model 'nothing'; use edgekd/detector, edgekd/resnet, torchvision/NAME"),
        ("edgekd/resnet", {"classes": 4}, "edgekd/resnet does not take .*classes"),
        ("no.such.module:f", {}, r"'no\.such\.module:f' cannot be imported"),
        ("torch.nn:Nothing", {}, "'torch.nn:Nothing' cannot be imported"),
        ("torch:float32", {}, "is a dtype, not a callable"),
        ("torch:zeros", {"size": (1,)}, "torch:zeros returned Tensor, not an nn.Module"),
    ],
)
def test_what_cannot_be_built_is_refused(model: str, kwargs: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=f"^here.*{message}"):
        built(model, trust=True, **kwargs)


def test_arguments_that_fetch_weights_are_left_out_of_a_rebuild():
    build = Build(
        model="torchvision/resnet18",
        kwargs={"weights": "DEFAULT", "weights_backbone": None, "pretrained": True, "groups": 1},
    )
    assert build.without_fetching().kwargs == {"groups": 1}


# ---- weights -------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    return nn.Linear(3, 2).state_dict()


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        *((".pt", wrap) for wrap in ("plain", "state_dict", "model", *PREFIXES)),
        *((".safetensors", wrap) for wrap in ("plain", *PREFIXES)),  # it holds no nested dicts
    ],
)
def test_weights_load_in_the_forms_they_come_in(wrap: str, suffix: str, tmp_path: Path):
    tensors = state()
    saved: Any = tensors
    if wrap in PREFIXES:
        saved = {f"{wrap}{name}": tensor for name, tensor in tensors.items()}
    elif wrap != "plain":
        saved = {wrap: tensors, "epoch": 3}
    path = tmp_path / f"weights{suffix}"
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    module = nn.Linear(3, 2)
    load_weights(module, path)
    assert all(torch.equal(module.state_dict()[name], tensors[name]) for name in tensors)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_is_refused_and_its_code_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="would run code"):
        load_weights(nn.Linear(3, 2), tmp_path / "weights.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ModelError):
        load_weights(nn.Linear(3, 2), tmp_path / "bare.pt")
    assert not Path("ran").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "weights.pt"
    with pytest.raises(ModelError, match=r"weights\.pt do not exist"):
        load_weights(nn.Linear(3, 2), path)
    torch.save(state(), path)
    with pytest.raises(ModelError, match=r"weight: \(2, 3\), the model has \(2, 4\)"):
        load_weights(nn.Linear(4, 2), path)
    torch.save(state() | {"other": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"does not fit Linear: unexpected \['other'\] \(1\)"):
        load_weights(nn.Linear(3, 2), path)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="holds a list"):
        load_weights(nn.Linear(3, 2), path)
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ModelError):
            load_weights(nn.Linear(3, 2), tmp_path / name)


# ---- the residual family -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, [16, 32, 64]),
        ({"scale": 0.5}, [8, 16, 32]),
        ({"scale": 0.1}, [8, 8, 8]),
        ({"scale": 0.7, "round_to": 4}, [12, 24, 44]),
        ({"widths": [12, 20]}, [16, 16]),  # 12 and 20 are halfway: Python rounds to even
    ],
)
def test_widths_are_scaled_and_rounded(options: dict[str, Any], widths: list[int]):
    module = resnet(num_classes=5, **options)
    assert [stage[0].conv1.out_channels for stage in module.stages] == widths
    assert module.head.in_features == widths[-1]


def test_depths_and_strides():
    module = resnet(num_classes=5, widths=[8, 16, 16], depths=[1, 2, 3], in_channels=1)
    assert [len(stage) for stage in module.stages] == [1, 2, 3]
    features: list[tuple[int, ...]] = []
    for stage in module.stages:
        stage.register_forward_hook(lambda *a: features.append(tuple(a[2].shape)))
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 5)
    assert features == [(2, 8, 28, 28), (2, 16, 14, 14), (2, 16, 7, 7)]
    # a block that changes nothing has no convolution in its shortcut
    assert isinstance(module.stages[2][0].shortcut, nn.Sequential)
    assert isinstance(module.stages[2][1].shortcut, nn.Identity)


@pytest.mark.parametrize(
    "options",
    [{"depths": [1, 2]}, {"depths": 0}, {"num_classes": 0}, {"in_channels": 0}, {"widths": []}],
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, Any]):
    with pytest.raises(ModelError, match="edgekd/resnet does not take"):
        built("edgekd/resnet", **{"num_classes": 4, **options})


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path):
    path, wide = tmp_path / "weights.pt", nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    found = {f"other{index}": torch.zeros(1) for index in range(5)}
    torch.save(found | {"0.weight": torch.zeros(2, 3), "0.bias": [0.0]}, path)
    with pytest.raises(ModelError) as error:
        load_weights(wide, path)
    said = str(error.value)
    assert "\n" not in said and "other4" not in said
    for part in (
        "does not fit Sequential: missing ['1.weight', '1.bias', '2.weight'] (6)",
        "unexpected ['other0', 'other1', 'other2'] (5)", "no tensors ['0.bias'] (1)",
        "of another shape ['0.weight: (2, 3), the model has (3, 3)'] (1); give the weights",
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path):
    path, tensors = tmp_path / "weights.pt", state()
    tensors["weight"][1, 2] = value
    torch.save(tensors, path)
    with pytest.raises(ModelError, match=r"NaN or infinity in \['weight'\] \(1\); give"):
        load_weights(nn.Linear(3, 2), path)


def test_a_mask_of_infinities_is_taken(tmp_path: Path):
    module = nn.Linear(3, 2)
    module.register_buffer("mask", torch.full((2,), -float("inf")))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    load_weights(module, tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_an_empty_file_is_said_to_be_empty(name: str, tmp_path: Path):
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=rf"{name} is empty; copy or save the weights again"):
        load_weights(nn.Linear(3, 2), tmp_path / name)


def test_the_hash_of_a_callables_source_follows_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "hashed_source.py"
    path.write_text("def make():\n    return 1\n")
    build = Build(model="hashed_source:make")
    assert source_sha256(build) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text("def make():\n    return 2\n")
    assert source_sha256(build) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_sha256(Build(model="edgekd/resnet")) is None


@pytest.mark.parametrize("name", ["nested", "called", "Made"])
def test_every_callable_has_a_source(name: str, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "callable_source.py"
    path.write_text(
        "from functools import partial\nclass Made:\n  def __call__(self):\n    return 1\n"
        "nested, called = partial(partial(Made)), Made()\n"
    )
    build = Build(model=f"callable_source:{name}")
    assert source_sha256(build) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_sha256(Build(model="builtins:dict")) is None
    assert source_sha256(Build(model="builtins:abs")) is None
