"""Recipes: what ships loads; every unknown key and wrong value is named with its path."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from edgekd.errors import RecipeError
from edgekd.recipe import Recipe, shipped_recipes
from edgekd.target import Target

RECIPES = Path(__file__).parents[1] / "edgekd" / "recipes"
TEXT = """
name = "small"
targets = ["host-onnxruntime"]

[data]
source = "mnist"

[teacher]
model = "edgekd/resnet"
epochs = 1

[student]
model = "edgekd/resnet"

[distill]
epochs = 2
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return path


def changed(file: Path, *changes: str) -> Recipe:
    return Recipe.load(file, changes=changes)


# ---- what ships --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_a_shipped_recipe_loads(name):
    recipe = Recipe.load(name)
    raw = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    assert recipe.name == name == raw["name"]
    assert list(recipe.targets) == raw["targets"]
    assert [Target.load(target).name for target in recipe.targets] == raw["targets"]
    assert recipe.distill.epochs == raw["distill"]["epochs"]
    # `edgekd init --list` prints the first line
    assert shipped_recipes()[name].startswith("# ")


def test_every_shipped_recipe_is_listed():
    texts = {path.stem: path.read_text() for path in RECIPES.glob("*.toml")}
    assert texts
    assert shipped_recipes() == texts


def test_a_missing_file_gets_the_nearest_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="'fashion-mnst'; did you mean 'fashion-mnist'"):
        Recipe.load("fashion-mnst")
    with pytest.raises(RecipeError, match="no recipe 'zzz'; there are: bccd, fashion-mnist, "):
        Recipe.load("zzz")
    with pytest.raises(RecipeError, match=r"no recipe '\.\./recipes/fashion-mnist'"):
        Recipe.load("../recipes/fashion-mnist")


@pytest.mark.parametrize("content", [b"name = ", b"[data\n", b'name = "\xff"'])
def test_what_is_not_toml_is_named(file, content):
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe.toml: not valid TOML: "):
        Recipe.load(file)


# ---- unknown keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sead", "seed"),
        ("distill.epoch", "epochs"),
        ("distill.alhpa", "alpha"),
        ("task.temprature", "temperature"),
        ("quantize.calibraton", "calibration"),
        ("teacher.weight", "weights"),
        ("student.modle", "model"),
        ("verify.agrement", "agreement"),
        ("profile.run", "runs"),
        ("data.sorce", "source"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest(file, key, nearest):
    with pytest.raises(RecipeError, match=f"{key}: unknown key; did you mean '{nearest}'"):
        changed(file, f"{key}=1")


def test_a_key_near_nothing_gets_the_list(file):
    with pytest.raises(RecipeError, match=r"profile.xyzzy: unknown key; there are: runs, threads$"):
        changed(file, "profile.xyzzy=1")


def test_an_unknown_section_is_refused(file):
    file.write_text(TEXT + "\n[qantize]\nepochs = 1\n")
    with pytest.raises(RecipeError, match=r"qantize: unknown key; did you mean 'quantize'"):
        Recipe.load(file)


def test_all_that_is_wrong_is_said_at_once(file):
    with pytest.raises(RecipeError) as error:
        changed(file, "distill.epoch=1", "verify.agreement=2", "sead=3")
    assert all(key in str(error.value) for key in ("distill.epoch", "verify.agreement", "sead"))
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(file):
    file.write_text(TEXT.replace('source = "mnist"', ""))
    with pytest.raises(RecipeError, match=r"data.source: Field required$"):
        Recipe.load(file)


# ---- wrong values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("distill.epochs=three", r"distill.epochs: .*integer.* \(got 'three'\)"),
        ("distill.epochs=2.5", r"distill.epochs: .*integer.* \(got 2.5\)"),
        ("distill.epochs=0", r"distill.epochs: .*greater than or equal to 1 \(got 0\)"),
        ("teacher.epochs=-1", r"teacher.epochs: .*greater than or equal to 0 \(got -1\)"),
        ("distill.alpha=1.01", r"distill.alpha: .*less than or equal to 1 \(got 1.01\)"),
        ("distill.alpha=nan", r"distill.alpha: .*\(got nan\)"),
        ("distill.lr=0", r"distill.lr: .*greater than 0 \(got 0\)"),
        ("quantize.lr=-0.1", r"quantize.lr: .*greater than 0 \(got -0.1\)"),
        ("distill.weight_decay=-1", r"distill.weight_decay: .*\(got -1\)"),
        ("distill.lr=inf", r"distill.lr: .*finite.* \(got inf\)"),
        ("distill.lr=nan", r"distill.lr: .*\(got nan\)"),
        ("task.temperature=0", r"task.temperature: .*greater than 0 \(got 0\)"),
        ("task.temperature=inf", r"task.temperature: .*finite.* \(got inf\)"),
        ("task.name=poetry", r"task.name: .*'classification'.* \(got 'poetry'\)"),
        ("data.size=[8,0]", r"data.size.*greater than or equal to 1 \(got 0\)"),
        ("data.channels=2", r"data.channels: .*1 or 3.* \(got 2\)"),
        ("data.train=0", r"data.train: .*\(got 0\)"),
        ("quantize.observer=max", r"quantize.observer: .*'mse'.* \(got 'max'\)"),
        ("quantize.calibration=0", r"quantize.calibration: .*\(got 0\)"),
        ("quantize.adaround=-1", r"quantize.adaround: .*\(got -1\)"),
        ("quantize.max_drop=-0.1", r"quantize.max_drop: .*greater than or equal to 0 \(got -0.1\)"),
        ("quantize.max_drop=2", r"quantize.max_drop: .*less than or equal to 1 \(got 2\)"),
        ("verify.agreement=99.5", r"verify.agreement: .*less than or equal to 1 \(got 99.5\)"),
        ("profile.runs=0", r"profile.runs: .*\(got 0\)"),
        ("seed=-1", r"seed: .*\(got -1\)"),
        ("targets=[]", r"targets: .*at least 1 .*\(got \[\]\)"),
        ("targets=intel-cpu", r"targets: .*tuple.* \(got 'intel-cpu'\)"),
        ("student.kwargs=[1]", r"student.kwargs: .*dictionary.* \(got \[1\]\)"),
        ("name='../up'", r"name: .*pattern.* \(got '../up'\)"),
        ("name=''", r"name: .*pattern.* \(got ''\)"),
        ("name='.hidden'", r"name: .*pattern.* \(got '.hidden'\)"),
        ("distill=3", r"distill: .*\(got 3\)"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(file, change, says):
    with pytest.raises(RecipeError, match=says) as error:
        changed(file, change)
    assert str(file) in str(error.value)


def test_detection_has_paths_and_a_size_of_its_own_and_no_temperature(file):
    detection = ["task.name=detection", "data.source=coco", "data.size=[192, 256]"]
    paths = ["data.root=cells", "data.annotations=cells/json", "data.images=/images"]
    recipe = changed(file, *detection, *paths)
    assert recipe.data.size == (192, 256)
    assert recipe.data.annotations == file.parent / "cells/json"
    assert recipe.data.images == Path("/images")
    with pytest.raises(RecipeError, match=r"task: .*detection has no temperature; remove it"):
        changed(file, *detection, "task.temperature=2")


# ---- --set -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("seed = 7", "seed", 7),
        ("distill.lr=0.25", "distill.lr", 0.25),
        ("distill.lr=1e-3", "distill.lr", 1e-3),
        ("quantize.observer=minmax", "quantize.observer", "minmax"),
        ('quantize.observer="minmax"', "quantize.observer", "minmax"),
        ("data.download=false", "data.download", False),
        ("data.augment=['flip', 'crop']", "data.augment", ("flip", "crop")),
        ("note=two words = one note", "note", "two words = one note"),
        ("note=", "note", ""),
        ("note=1.2.3", "note", "1.2.3"),
        ("student.kwargs={ widths = [8, 16] }", "student.kwargs", {"widths": [8, 16]}),
        ("student.kwargs.scale=0.5", "student.kwargs", {"scale": 0.5}),
        ("student.kwargs.deep.er=x", "student.kwargs", {"deep": {"er": "x"}}),
        ("verify.agreement=0.9", "verify.agreement", 0.9),  # a section that the file leaves out
    ],
)
def test_set_changes_one_value(file, change, path, value):
    found = changed(file, change)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_set_leaves_the_rest_alone(file):
    before, after = Recipe.load(file), changed(file, "distill.lr=0.25")
    assert before.distill.lr != 0.25
    assert after.model_copy(update={"distill": before.distill}) == before


def test_the_last_set_wins(file):
    assert changed(file, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("change", ["seed", "=3", "distill.=3", ".lr=3", "", "distill..lr=3"])
def test_a_malformed_set_says_how_to_write_it(file, change):
    with pytest.raises(RecipeError, match=r"write section\.key=value"):
        changed(file, change)


def test_set_below_a_value_is_refused(file):
    with pytest.raises(RecipeError, match=r"seed\.x=1': seed is a value, not a section"):
        changed(file, "seed=3", "seed.x=1")


# ---- targets -----------------------------------------------------------------------------------


def test_targets_replace_the_recipes(file):
    chosen = Recipe.load(file, targets=["intel-cpu", "android-arm64"]).targets
    assert chosen == ("intel-cpu", "android-arm64")
    assert Recipe.load(file, targets=[]).targets == ("host-onnxruntime",)
    assert Recipe.load(file, targets=iter(["intel-cpu"])).targets == ("intel-cpu",)


def test_a_target_named_twice_counts_once(file):
    chosen = Recipe.load(file, targets=["intel-cpu", "android-arm64", "intel-cpu"]).targets
    assert chosen == ("intel-cpu", "android-arm64")


# ---- paths -------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    text = TEXT.replace('source = "mnist"', 'source = "mnist"\nroot = "images"')
    text = text.replace("[teacher]", '[teacher]\nweights = "../teacher.pt"')
    absolute = tmp_path / "elsewhere" / "student.pt"
    text = text.replace("[student]", f'[student]\nweights = "{absolute}"')
    (folder / "recipe.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("project/recipe.toml")
    assert recipe.data.root.resolve() == folder / "images"
    assert recipe.teacher.weights.resolve() == tmp_path / "teacher.pt"
    assert recipe.student.weights == absolute


def test_the_home_folder_is_understood(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert changed(file, "data.root=~/images").data.root == Path("/home/somebody/images")


def test_paths_that_are_not_given_stay_none(file):
    recipe = Recipe.load(file)
    assert recipe.data.root is None
    assert recipe.teacher.weights is None
    assert recipe.student.weights is None


# ---- values ------------------------------------------------------------------------------------


def test_a_recipe_and_its_sections_are_frozen(file):
    recipe = Recipe.load(file)
    sections = [value for _, value in recipe if isinstance(value, BaseModel)]
    assert len(sections) == 8
    for section in [recipe, *sections]:
        field = next(iter(type(section).model_fields))
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, field, getattr(section, field))


def test_the_teacher_may_be_left_out(file):
    start, end = TEXT.index("[teacher]"), TEXT.index("[student]")
    file.write_text(TEXT[:start] + TEXT[end:])
    assert Recipe.load(file).teacher is None


# ---- budgets and devices -----------------------------------------------------------------------


def test_budgets_and_devices_from_the_command_line(file):
    recipe = Recipe.load(
        file, targets=["intel-cpu", "jetson-nano"], latency=["5ms", "intel-cpu=800us"],
        devices=["jetson-nano=ssh://me@nano"],
    )  # fmt: skip
    assert recipe.budget_ms == {"intel-cpu": 0.8, "jetson-nano": 5.0}
    assert recipe.devices == {"jetson-nano": "ssh://me@nano"}
    assert Recipe.load(file, latency=["0.25s"]).budget_ms == {"host-onnxruntime": 250.0}
    alone = Recipe.load(file, devices=["ssh://me@here"])
    assert alone.devices == {"host-onnxruntime": "ssh://me@here"}


def test_a_table_of_targets_names_their_devices(file):
    text = file.read_text().replace('targets = ["host-onnxruntime"]', "")
    file.write_text(
        text + '[targets.intel-cpu]\n[targets.jetson-nano]\ndevice = "ssh://me@nano"\n'
        "[budget]\nlatency_ms = { jetson-nano = 20 }\n"
    )
    recipe = Recipe.load(file)
    assert recipe.targets == ("intel-cpu", "jetson-nano")
    assert recipe.devices == {"jetson-nano": "ssh://me@nano"}
    assert recipe.budget_ms == {"jetson-nano": 20.0}
    # what is said of a target that is not asked for is left out
    narrowed = Recipe.load(file, targets=["intel-cpu"])
    assert (narrowed.targets, narrowed.devices, narrowed.budget_ms) == (("intel-cpu",), {}, {})
    kept = Recipe.load(file, targets=["jetson-nano"], latency=["9ms"])
    assert (kept.devices, kept.budget_ms) == (recipe.devices, {"jetson-nano": 9.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": ["5"]}, "--latency 5: write a time with its unit, such as 5ms or 800us"),
        ({"latency": ["-5ms"]}, "write a time with its unit"),
        ({"latency": ["0ms"]}, r"budget\.latency_ms.*greater than 0"),
        ({"latency": ["intel=5ms"]}, "'intel' is no target of it"),
        ({"devices": ["ssh://a"], "targets": ["intel-cpu", "jetson-nano"]},
         "there are 2 targets .*write --device TARGET=ssh://a"),
        ({"changes": ["devices={x='ssh://a'}"]}, "devices names 'x', which is not one of"),
        ({"changes": ["budget.latency_ms={x=5}"]}, r"budget\.latency_ms names 'x', which is not"),
        ({"changes": ["targets={intel-cpu={link='x'}}"]}, "it takes one key: device"),
        ({"changes": ["student.weights=a.pt", "student.space={scale=[1,2]}"]},
         r"student\.weights fit one member"),
        ({"changes": ["student.space={scale=[]}"]}, r"student\.space\.scale"),
        ({"changes": ["prune.ratio=much"]}, r"prune\.ratio"),
        ({"changes": ["targets=5"]}, r"targets: .*\(got 5\)"),
        ({"changes": ["targets=5"], "latency": ["5ms"]}, r"targets: .*\(got 5\)"),
        ({"changes": ["budget=5"], "latency": ["5ms"]}, r"budget: it is 5, not a section"),
        ({"changes": ["devices=ssh://me@x"], "devices": ["ssh://me@y"]},
         "devices: it is 'ssh://me@x', not a section"),
        ({"changes": ["targets={intel-cpu={}}", "devices=5"]}, r"devices: .*\(got 5\)"),
        ({"changes": ["data.root=~nouser/x"]}, "root: ~nouser/x: no such user here"),
        ({"changes": ["seed=99999999999999999999"]}, r"seed: .*less than .*\(got 9{20}\)"),
        ({"devices": ["foo://x"]}, "host-onnxruntime: no device 'foo://x'; there are: adb"),
        ({"devices": ["ssh://-x"]}, "host-onnxruntime: 'ssh://-x' is no address"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(file, options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(file, **options)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("prune.ratio=auto", 'prune.ratio = "auto"'),
        ("student.space={scale=[1,2]}", "student.space or student.models"),
        ("student.models=[{model='torchvision/resnet18'}]", "student.space or student.models"),
    ],
)
def test_a_choice_needs_a_budget(file, change, what):
    assert changed(file, change).needs_budget == what
    assert Recipe.load(file, changes=[change], latency=["5ms"]).needs_budget is None
    none_left = changed(file, change, "budget.latency_ms={}")
    assert none_left.needs_budget == what
