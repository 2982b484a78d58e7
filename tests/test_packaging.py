"""What a user installs: the wheel's contents, the constraints files, the Makefile's answers, and what imports need."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
CONSTRAINTS = {path.stem: path for path in sorted((PROJECT / "constraints").glob("*.txt"))}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="hatchling is not installed; `make env` brings it")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_ships_the_package_its_configs_and_its_licence_and_nothing_else(wheel):
    names = wheel.namelist()
    assert "allmrec_jax/py.typed" in names
    for config in (PROJECT / "configs").rglob("*.py"):
        assert f"allmrec_jax/configs/{config.relative_to(PROJECT / 'configs').as_posix()}" in names
    assert {"allmrec_jax/evaluation/page.css", "allmrec_jax/evaluation/paper_numbers.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("allmrec_jax/", "allmrec_jax-")) for name in names)
    assert not any("__pycache__" in name for name in names)
    assert sum(entry.file_size for entry in wheel.infolist()) < 5e6, "data or weights in the wheel?"


def test_the_wheel_has_the_package_s_version_and_command(wheel):
    import allmrec_jax

    assert wheel.filename is not None
    assert Path(wheel.filename).name == f"allmrec_jax-{allmrec_jax.__version__}-py3-none-any.whl"
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "allmrec = allmrec_jax.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.parametrize("path", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_constraints_are_exact_versions_without_addresses(path):
    for line in path.read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


@pytest.mark.parametrize("path", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_constraints_satisfy_the_project_s_own_ranges(path):
    from packaging.requirements import Requirement

    pins = pinned(path)
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["dev"], *extras["torch"], *extras["tpu"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[normal(requirement.name)]), line


def test_constraints_name_all_that_the_environment_of_the_tests_draws_in():
    from packaging.requirements import Requirement

    pins = pinned(CONSTRAINTS["py311" if sys.version_info[:2] == (3, 11) else "py312"])
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    waiting = [
        Requirement(line) for line in [*project["dependencies"], *extras["dev"], *extras["torch"], *extras["tpu"]]
    ]
    seen, missing = set(), set()
    while waiting:
        requirement = waiting.pop()
        name = normal(requirement.name)
        if (name, frozenset(requirement.extras)) in seen or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in pins:
            missing.add(name)
        try:
            wanted = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for line in wanted:
            further = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if further.marker is None or any(further.marker.evaluate(environment) for environment in environments):
                waiting.append(further)
    assert not missing


# Accelerator images often lack these (and PyTorch belongs to the baseline alone).
HEAVY = ("polars", "tyro", "tensorflow_datasets", "gguf", "transformers", "matplotlib", "torch", "tensorflow")

IMPORT_ALL = f"""
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ImportError(name + " is imported at module level")

sys.meta_path.insert(0, Refuse())
import allmrec_jax
for room in ("models", "training", "comparison"):
    for module in pkgutil.walk_packages(allmrec_jax.__path__, "allmrec_jax."):
        if module.name.split(".")[1] == room:
            importlib.import_module(module.name)
            print(module.name)
"""


def test_models_training_and_comparison_import_without_the_heavy_packages():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "allmrec_jax.models.params" in done.stdout.split()


def test_importing_the_package_imports_nothing_else():
    code = "import sys, allmrec_jax; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_the_readme_s_config_can_be_used(tmp_path):
    from allmrec_jax.config import load_config

    (example,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), flags=re.DOTALL)
    path = tmp_path / "mine.py"
    path.write_text(example)
    experiment = load_config(str(path))
    assert (experiment.name, experiment.cf.epochs) == ("mine", 50)


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # The tests themselves may have been started by make, whose variables must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "VENV"))}
    return subprocess.run(["make", *words], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


def test_make_alone_says_what_it_can_do():
    done = make()
    assert done.returncode == 0
    for goal in ("make env", "make demo", "make demo-full", "make test", "make test-all"):
        assert goal in done.stdout


def test_make_without_a_fitting_python_says_so_and_leaves_nothing_behind(tmp_path):
    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\necho 'not installed' >&2\nexit 127\n")
    broken.chmod(0o755)
    done = make("demo", f"PYTHON={broken}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "no Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()
