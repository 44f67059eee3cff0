"""Recipe: one TOML file says what to do; unknown keys are refused."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgekd.errors import RecipeError, describe_invalid, nearest
from edgekd.models.build import FETCHES, Build
from edgekd.quantization.fake_quant import Observer
from edgekd.stages.prune import check_goal

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskSection(_Section):
    """What the network is for."""

    name: Literal["classification", "detection"] = "classification"
    temperature: Positive = 4.0
    label_smoothing: Share = 0.0

    @model_validator(mode="after")
    def _of_the_task(self) -> TaskSection:
        if self.name == "detection" and (given := self.model_fields_set - {"name"}):
            raise ValueError(f"detection has no {' and no '.join(sorted(given))}; remove it")
        return self


class DataSection(_Section):
    """Where images come from; see `edgekd.data.readers.read_data`."""

    source: str
    root: Path | None = None
    annotations: Path | None = None
    images: Path | None = None
    strict: bool = False
    augment: tuple[str, ...] = ()
    channels: Literal[1, 3] | None = None
    size: Count | tuple[Count, Count] | None = None
    train: Count | None = None
    test: Count | None = None
    download: bool = True


class _Training(_Section):
    batch_size: Count = 128
    lr: Positive = 0.1
    weight_decay: NotNegative = 5e-4


class _Learning(_Training):
    alpha: Share = 0.9
    hints: Literal["auto"] | tuple[str | tuple[str, str], ...] = ()
    hint_weight: NotNegative = 1.0


class StudentSection(_Section):
    """A model by name, and weights to start from."""

    model: str
    kwargs: dict[str, Any] = {}
    weights: Path | None = None

    @property
    def brings_weights(self) -> bool:
        """Whether the model's own arguments fetch trained weights."""
        return bool(FETCHES & self.kwargs.keys())

    def build(self) -> Build:
        """What rebuilds the module."""
        return Build(model=self.model, kwargs=self.kwargs)


class TeacherSection(StudentSection, _Training):
    """The teacher: with `weights`, or `epochs` to train it here."""

    epochs: Annotated[int, Field(ge=0)] = 0


class DistillSection(_Learning):
    """Keywords of `edgekd.distill`."""

    epochs: Count


class PruneSection(_Learning):
    """Keywords of `edgekd.prune`; without `round_to`, what all of the targets take."""

    ratio: float | None = None
    macs: int | float | None = None
    params: int | float | None = None
    round_to: Count | None = None
    ignore: tuple[str, ...] = ()
    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Positive = 0.05

    @model_validator(mode="after")
    def _one_goal(self) -> PruneSection:
        check_goal(self.ratio, self.macs, self.params)
        return self


class QuantizeSection(_Learning):
    """Keywords of `edgekd.quantize`."""

    epochs: Annotated[int, Field(ge=0)] = 0
    calibration: Count = 512
    observer: Observer = "mse"
    equalized: bool = False
    adaround: Annotated[int, Field(ge=0)] = 0
    correct_bias: bool = True
    float_layers: tuple[str, ...] = ()
    max_drop: Share | None = None
    lr: Positive = 1e-3
    weight_decay: NotNegative = 1e-4
    freeze_scales: Share = 1.0


class VerifySection(_Section):
    """Gates of `edgekd.verify`."""

    agreement: Share = 0.995
    metric_gap: Share = 0.001
    mean_steps: Positive = 1.0
    integer_share: Share = 1.0
    local_exact: Share = 0.999


class ProfileSection(_Section):
    """Keywords of `edgekd.profile`."""

    runs: Count = 300
    threads: Count = 1


class Recipe(_Section):
    """What to do, from data to artifacts."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    note: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    task: TaskSection = TaskSection()
    data: DataSection
    teacher: TeacherSection | None = None
    student: StudentSection
    distill: DistillSection
    prune: PruneSection | None = None
    quantize: QuantizeSection = QuantizeSection()
    controls: bool = False
    verify: VerifySection = VerifySection()
    profile: ProfileSection = ProfileSection()

    @field_validator("targets")
    @classmethod
    def _once_each(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(targets))

    @staticmethod
    def load(
        path: str | Path, *, changes: Iterable[str] = (), targets: Iterable[str] = ()
    ) -> Recipe:
        """Read a recipe: a file, or the name of one that ships with edgekd.

        Args:
            path: `recipe.toml`, or a name as `edgekd init --list` prints it.
            changes: `section.key=value`, the value as in TOML; a bare word is a string.
            targets: take the place of the recipe's, if any.

        Raises:
            RecipeError: no such file, not TOML, or keys and values that do not fit: each is named
                with its path, an unknown one with the nearest valid name.
        """
        file = _find(path)
        try:
            values = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not valid TOML: {error}") from None
        for change in changes:
            _apply(values, change)
        if chosen := list(targets):
            values["targets"] = chosen
        try:
            recipe = Recipe(**values)
        except ValidationError as error:
            raise RecipeError(f"{path}: {describe_invalid(error, Recipe)}") from None
        return _relative_to(recipe, file.parent) if file == Path(path) else recipe


def shipped_recipes() -> dict[str, str]:
    """Name -> text of the recipes inside the package."""
    folder = files("edgekd") / "recipes"
    return {
        item.name.removesuffix(".toml"): item.read_text()
        for item in folder.iterdir()
        if item.name.endswith(".toml")
    }


def _find(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    shipped = Path(str(files("edgekd") / "recipes" / f"{path}.toml"))
    if "/" not in str(path) and shipped.is_file():
        return shipped
    raise RecipeError(f"no recipe {str(path)!r}{nearest(str(path), shipped_recipes())}")


def _apply(values: dict[str, Any], change: str) -> None:
    """Put `section.key=value` into `values`."""
    name, equals, text = change.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {change!r}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {change!r}: {part} is a value, not a section")
        values = inner
    values[parts[-1]] = value


def _relative_to(recipe: Recipe, folder: Path) -> Recipe:
    """Paths in a recipe's file are relative to that file."""

    def moved(section: BaseModel | None, key: str) -> BaseModel | None:
        path = None if section is None else getattr(section, key)
        if section is None or path is None:
            return section
        return section.model_copy(update={key: folder / path.expanduser()})

    return recipe.model_copy(
        update={
            "data": moved(moved(moved(recipe.data, "root"), "annotations"), "images"),
            "teacher": moved(recipe.teacher, "weights"),
            "student": moved(recipe.student, "weights"),
        }
    )
