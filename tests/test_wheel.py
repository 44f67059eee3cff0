"""The wheel, installed elsewhere: targets, profiles and recipes are inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json

import edgekd
from edgekd.recipe import Recipe, shipped_recipes
from edgekd.target import Target, target_names

print(json.dumps({
    "file": edgekd.__file__,
    "targets": {name: Target.load(name).title for name in target_names()},
    "recipes": {name: Recipe.load(name).name for name in shipped_recipes()},
}))
"""


def python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_data_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"edgekd/_data/targets/{p.name}" for p in (ROOT / "targets").glob("*.toml")}
    wanted |= {f"edgekd/_data/profiles/{p.name}" for p in (ROOT / "profiles").glob("*.csv")}
    wanted |= {f"edgekd/recipes/{p.name}" for p in (ROOT / "edgekd" / "recipes").glob("*.toml")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "edgekd").rglob("*.py")}
    assert wanted <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"edgekd"}
    assert not [name for name in names if "__pycache__" in name]


def test_installed_elsewhere_it_finds_its_targets_and_recipes(wheel, tmp_path):
    site, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    python("-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel, cwd=away)
    # PYTHONPATH comes before the editable install; EDGEKD_HOME would overlay
    found = json.loads(python("-c", SCRIPT, cwd=away, PYTHONPATH=str(site), EDGEKD_HOME=str(away)))
    assert Path(found["file"]).is_relative_to(site)
    assert sorted(found["targets"]) == sorted(p.stem for p in (ROOT / "targets").glob("*.toml"))
    recipes = sorted(p.stem for p in (ROOT / "edgekd" / "recipes").glob("*.toml"))
    assert found["recipes"] == {name: name for name in recipes}
    assert (site / "bin" / "edgekd").exists()
