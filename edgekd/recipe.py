"""Recipe: one TOML file says what to do; unknown keys are refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgekd.devices.base import get_device
from edgekd.errors import DeviceError, RecipeError, describe_invalid, nearest
from edgekd.knowledge.feature import HintLoss
from edgekd.models.build import FETCHES, Build
from edgekd.quantization.fake_quant import Observer
from edgekd.runtimes.on_device.measure import MOST_RUNS
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
    """Where images come from; see `edgekd.data.readers.read_data`.

    Attributes:
        mean, std: per channel, for pixels from 0 to 1: what given weights were trained with. None:
            those of the training images.
    """

    source: str
    root: Path | None = None
    annotations: Path | None = None
    images: Path | None = None
    strict: bool = False
    augment: tuple[str, ...] = ()
    channels: Literal[1, 3] | None = None
    size: Count | tuple[Count, Count] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    train: Count | None = None
    test: Count | None = None
    download: bool = True

    @model_validator(mode="after")
    def _both_or_none(self) -> DataSection:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both, or none")
        return self


class _Training(_Section):
    batch_size: Count = 128
    lr: Positive = 0.1
    weight_decay: NotNegative = 5e-4


class _Learning(_Training):
    alpha: Share = 0.9
    hints: Literal["auto"] | tuple[str | tuple[str, str], ...] = ()
    hint_weight: NotNegative = 1.0
    hint_loss: HintLoss = "fitnets"


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


class ChosenSection(StudentSection):
    """The student, or what it is chosen among under a budget.

    Attributes:
        space: argument of `model` -> its values; members are all combinations. None: the family's
            own, see `edgekd.models.build.SPACES`; of a model without one, `kwargs` alone.
        models: further members, as they are.
    """

    space: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] | None = None
    models: tuple[StudentSection, ...] = ()


class TeacherSection(StudentSection, _Training):
    """The teacher: with `weights`, or `epochs` to train it here."""

    epochs: Annotated[int, Field(ge=0)] = 0


class DistillSection(_Learning):
    """Keywords of `edgekd.distill`."""

    epochs: Count


class PruneSection(_Learning):
    """Keywords of `edgekd.prune`; without `round_to`, what all of the targets take.

    Attributes:
        ratio: or "auto": chosen together with the student, under a budget.
    """

    ratio: float | Literal["auto"] | None = None
    macs: int | float | None = None
    params: int | float | None = None
    round_to: Count | None = None
    ignore: tuple[str, ...] = ()
    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Positive = 0.05

    @model_validator(mode="after")
    def _one_goal(self) -> PruneSection:
        # what "auto" becomes is in range
        check_goal(0.0 if self.ratio == "auto" else self.ratio, self.macs, self.params)
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
    batchnorm: Share = 0.0


class VerifySection(_Section):
    """Gates of `edgekd.verify`."""

    agreement: Share = 0.995
    metric_gap: Share = 0.001
    mean_steps: Positive = 1.0
    integer_share: Share = 1.0
    local_exact: Share = 0.999


class ProfileSection(_Section):
    """Keywords of `edgekd.profile`."""

    runs: Count = MOST_RUNS
    threads: Count = 1


class BudgetSection(_Section):
    """What the artifact may cost; the student is the largest that keeps to it.

    Attributes:
        latency_ms: p50 of batch 1, of each target, or by target's name.
        require_measured: an estimate does not do: fail where the budget's target is not measured.
    """

    latency_ms: Positive | dict[str, Positive]
    require_measured: bool = False


class Recipe(_Section):
    """What to do, from data to artifacts.

    Attributes:
        teachers: further ones beside the first: the student learns from the ensemble.
        targets: names; in a recipe's file also a table of them, with their devices.
        devices: target -> the link that its artifacts are measured over.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    note: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    devices: dict[str, str] = {}
    budget: BudgetSection | None = None
    task: TaskSection = TaskSection()
    data: DataSection
    teacher: TeacherSection | None = None
    teachers: tuple[TeacherSection, ...] = ()
    student: ChosenSection
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

    @field_validator("devices")
    @classmethod
    def _links(cls, devices: dict[str, str]) -> dict[str, str]:
        for name, address in devices.items():
            try:
                get_device(address)  # not reached yet
            except DeviceError as error:
                raise ValueError(f"{name}: {error}") from None
        return devices

    @model_validator(mode="before")
    @classmethod
    def _table_of_targets(cls, values: Any) -> Any:
        """`targets.<name>.device = "ssh://user@host"` gives names and devices at once."""
        if not isinstance(values, dict) or not isinstance(table := values.get("targets"), dict):
            return values
        devices = values.get("devices", {})
        if not isinstance(devices, dict):
            return values  # which is refused: it is no table
        devices = dict(devices)
        for name, section in table.items():
            if not isinstance(section, dict) or section.keys() - {"device"}:
                raise ValueError(f"targets.{name} is {section!r}; it takes one key: device")
            if "device" in section:
                devices.setdefault(name, section["device"])
        return values | {"targets": tuple(table), "devices": devices}

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        """What is named for a target names one of the recipe's; weights fit one student."""
        if self.student.weights is not None and (self.student.space or self.student.models):
            raise ValueError("student.weights fit one member; leave them, or the choice, out")
        budget = {} if self.budget is None else self.budget.latency_ms
        named: dict[str, Iterable[str]] = {
            "devices": self.devices,
            "budget.latency_ms": budget if isinstance(budget, dict) else {},
        }
        for key, names in named.items():
            for name in names:
                if name not in self.targets:
                    raise ValueError(
                        f"{key} names {name!r}, which is not one of the recipe's targets"
                        f"{nearest(name, self.targets)}"
                    )
        return self

    @property
    def needs_budget(self) -> str | None:
        """What is to be chosen where there is no budget to choose it under."""
        if self.budget_ms:
            return None
        if self.prune is not None and self.prune.ratio == "auto":
            return 'prune.ratio = "auto"'
        return (
            "student.space or student.models" if self.student.space or self.student.models else None
        )

    @property
    def budget_ms(self) -> dict[str, float]:
        """Target -> its budget; targets without one are absent."""
        if self.budget is None:
            return {}
        given = self.budget.latency_ms
        return given if isinstance(given, dict) else dict.fromkeys(self.targets, given)

    @staticmethod
    def load(
        path: str | Path,
        *,
        changes: Iterable[str] = (),
        targets: Iterable[str] = (),
        latency: Iterable[str] = (),
        devices: Iterable[str] = (),
    ) -> Recipe:
        """Read a recipe: a file, or the name of one that ships with edgekd.

        Args:
            path: `recipe.toml`, or a name as `edgekd init --list` prints it.
            changes: `section.key=value`, the value as in TOML; a bare word is a string.
            targets: take the place of the recipe's, if any.
            latency: budgets: `5ms` for all targets, or `TARGET=5ms`; also `us` and `s`.
            devices: `TARGET=LINK`, or a link where there is one target.

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
            _only(values, chosen)
        known = list(named) if isinstance(named := values.get("targets"), list | dict) else []
        for name, text in by_target("--latency", latency, known):
            budget = _section(values, "budget").setdefault("latency_ms", {})
            if not isinstance(budget, dict):
                budget = values["budget"]["latency_ms"] = dict.fromkeys(known, budget)
            budget[name] = _milliseconds(text)
        for name, link in by_target("--device", devices, known, one=True):
            _section(values, "devices")[name] = link
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


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of this name, made where there is none."""
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise RecipeError(f"{name}: it is {section!r}, not a section; write [{name}]")
    return section


def by_target(
    option: str, given: Iterable[str], targets: Sequence[str], *, one: bool = False
) -> Iterator[tuple[str, str]]:
    """(target, value) of each `TARGET=VALUE`; a bare value is every target's.

    Args:
        option: for messages.
        one: a bare value is for a single target only.

    Raises:
        RecipeError: a name that is none of `targets`, or a bare value of several.
    """
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and one and len(targets) != 1:
            raise RecipeError(
                f"{option} {text}: there are {len(targets)} targets ({', '.join(targets)}); write "
                f"{option} TARGET={text}"
            )
        if equals and name not in targets:
            raise RecipeError(
                f"{option} {text}: {name!r} is no target of it{nearest(name, targets)}"
            )
        for target in [name] if equals else targets:
            yield target, value if equals else text


def _milliseconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|µs|ms|s)", text.strip())
    if found is None:
        raise RecipeError(f"--latency {text}: write a time with its unit, such as 5ms or 800us")
    return float(found[1]) * {"s": 1e3, "ms": 1.0}.get(found[2], 1e-3)


def _only(values: dict[str, Any], chosen: list[str]) -> None:
    """Put `chosen` in the place of the targets in `values`; what is said of others is left out."""
    table, budget = values.get("targets"), values.get("budget")
    if isinstance(table, dict):
        values["targets"] = {name: table.get(name, {}) for name in chosen}
    else:
        values["targets"] = chosen
    for section, key in ((values, "devices"), (budget, "latency_ms")):
        if isinstance(section, dict) and isinstance(each := section.get(key), dict):
            section[key] = {name: x for name, x in each.items() if name in chosen}


def _relative_to(recipe: Recipe, folder: Path) -> Recipe:
    """Paths in a recipe's file are relative to that file."""

    def moved(section: BaseModel | None, key: str) -> BaseModel | None:
        path = None if section is None else getattr(section, key)
        if section is None or path is None:
            return section
        try:
            return section.model_copy(update={key: folder / path.expanduser()})
        except RuntimeError:
            raise RecipeError(f"{key}: {path}: no such user here; write the whole path") from None

    return recipe.model_copy(
        update={
            "data": moved(moved(moved(recipe.data, "root"), "annotations"), "images"),
            "teacher": moved(recipe.teacher, "weights"),
            "teachers": tuple(moved(each, "weights") for each in recipe.teachers),
            "student": moved(recipe.student, "weights"),
        }
    )
