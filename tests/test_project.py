"""The project's own files: metadata, assets and their list, settings, and the Makefile with a stand-in for Python."""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import gradinv
from gradinv.models import MODELS
from gradinv.paths import ASSETS

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image"}


def requirements(*extras: str) -> set[str]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.split(r"[<>=!~\[ ]", line)[0] for line in lines}


def third_party(paths: list[Path]) -> set[str]:
    """The distributions whose modules these files import, anywhere in them."""
    modules: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in modules - sys.stdlib_module_names - {"gradinv", "app"}}


# --- metadata


def test_everything_imported_is_declared() -> None:
    # Without plotly evaluations draw no figure, and say so.
    drawing = [ROOT / "gradinv" / name for name in ("figures.py", "evaluation/table.py")]
    library = [path for path in ROOT.glob("gradinv/**/*.py") if "web" not in path.parts and path not in drawing]
    scripts = list(ASSETS.glob("models/*.py"))
    page = [ROOT / "app.py", *ROOT.glob("gradinv/web/**/*.py"), *drawing]
    recipes = {script.stem for script in scripts}  # they import each other
    tools = {script.stem for script in ROOT.glob("docs/*.py")}
    assert third_party([*library, *scripts]) - recipes <= requirements()
    assert third_party(drawing) - {"plotly"} <= requirements()
    assert third_party(page) <= requirements("app")
    assert third_party(list(ROOT.glob("tests/*.py"))) - {"conftest", "headless"} - recipes - tools <= requirements(
        "app", "test"
    )


def test_version_is_that_of_the_package() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    builder = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    assert builder.metadata.version == gradinv.__version__


def test_script_is_there_to_be_called() -> None:
    module, function = PROJECT["project"]["scripts"]["gradinv"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_wheel_carries_the_package_and_its_assets() -> None:
    builder = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    files = {file.distribution_path for file in builder.recurse_included_files()}
    assert {f"gradinv/assets/models/{info.name}.safetensors" for info in MODELS.values() if info.bundled} <= files
    assert {"gradinv/assets/samples/goldfish.jpg", "gradinv/assets/SOURCES.md", "gradinv/attack/inversion.py"} <= files
    assert all(name.startswith("gradinv/") for name in files)


def test_an_editable_installation_copies_no_assets() -> None:
    builder = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    assert builder.config.dev_mode_dirs == ["."] and builder.config.get_force_include() == {}


@pytest.mark.parametrize("place", ["environment", "wheel", "checkout"])
def test_assets_are_found(place: str, tmp_path: Path) -> None:
    package = tmp_path / "gradinv"
    package.mkdir()
    shutil.copy(ROOT / "gradinv" / "paths.py", package)
    expected = {"environment": tmp_path / "mine", "wheel": package / "assets", "checkout": tmp_path / "assets"}[place]
    if place != "checkout":
        (package / "assets").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "GRADINV_ASSETS"}
    if place == "environment":
        environment["GRADINV_ASSETS"] = str(expected)
    code = "from paths import ASSETS; print(ASSETS)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)


# --- assets


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_assets_are_those_that_are_listed() -> None:
    listed = dict(re.findall(r"^\| `(\S+)` \| ([0-9a-f]{64}) \|$", (ASSETS / "SOURCES.md").read_text(), re.MULTILINE))
    with (ASSETS / "samples" / "samples.csv").open(newline="", encoding="utf-8") as file:
        listed |= {f"samples/{row['file']}": row["sha256"] for row in csv.DictReader(file)}
    ours = {".py", ".md", ".css", ".svg", ".json"}  # made for this project, and edited now and then
    files = [path for path in ASSETS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found = {path.relative_to(ASSETS).as_posix(): sha256(path) for path in files if path.suffix not in ours}
    assert found == listed
    for info in MODELS.values():
        assert not info.bundled or listed[f"models/{info.name}.safetensors"] == info.sha256


def test_settings_of_the_page_are_known_to_streamlit() -> None:
    def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        items: dict[str, Any] = {}
        for name, value in table.items():
            items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return items

    config = importlib.import_module("streamlit.config")
    settings = flat(tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text()))
    assert {name for name in settings if name not in config._config_options_template} == set()
    assert settings["browser.gatherUsageStats"] is False and settings["browser.serverAddress"] == "localhost"
    assert settings["server.headless"] is True
    assert settings["runner.postScriptGC"] is False and settings["server.fileWatcherType"] == "none"


# --- Makefile

# Does what the Makefile asks of a Python: answers the question for its version and modules, makes an environment that
# holds a copy of itself, and notes what is installed. `fails` and `old` are files whose presence makes it refuse.
STAND_IN = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    "-c import sys; sys.exit(sys.version_info < (3, 11))") [ ! -e "$STATE/old" ] ;;
    "-c import ensurepip, venv") [ ! -e "$STATE/bare" ] ;;
    "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo venv >>"$STATE/log" ;;
    "-m pip --version") ;;
    "-m pip "*)
        shift 3; echo "pip $*" >>"$STATE/log"
        case "$*" in *"$(cat "$STATE/fails" 2>/dev/null || echo nothing)"*) exit 1 ;; esac ;;
    *) shift; echo "run $*" >>"$STATE/log" ;;
esac
"""


class Makefile:
    """A copy of the Makefile in a folder of its own, with the stand-in as the only Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        for tool in ("sh", "make", "cat", "cmp", "cp", "dirname", "echo", "mkdir", "rm", "test", "touch"):
            (self.bin / tool).symlink_to(shutil.which(tool) or "")
        python = self.bin / "python3"
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def make(self, *arguments: str, fails: bool = False) -> list[str]:
        """Call make: → what the stand-in was asked to do, one line each."""
        (self.folder / "log").unlink(missing_ok=True)
        self.done = subprocess.run(
            [self.bin / "make", *arguments],
            cwd=self.folder,
            env={"PATH": str(self.bin), "STATE": str(self.folder)},
            capture_output=True,
            text=True,
        )
        assert (self.done.returncode != 0) == fails, self.done.stderr
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def makefile(tmp_path: Path) -> Makefile:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Makefile(tmp_path)


TORCH, APP, TEST = (
    "pip install torch torchvision",
    "pip install --editable .[app]",
    "pip install --editable .[app,test]",
)
SERVE = "run streamlit run app.py --server.address localhost --server.port 8501"
PYTEST = "run pytest --numprocesses logical --maxprocesses 4 --dist worksteal"
CHECKS = ["run ruff check .", "run ruff format --check .", "run mypy gradinv", PYTEST]
GONE = "pip uninstall --quiet --yes torch torchvision"


def from_index(index: str) -> str:
    return f"pip install --index-url {index} torch torchvision"


def test_app_and_tests_install_what_they_need_once(makefile: Makefile) -> None:
    assert makefile.make("app") == ["venv", TORCH, APP, SERVE]
    served = "run streamlit run app.py --server.address 0.0.0.0 --server.port 9000"
    assert makefile.make("app", "PORT=9000", "ADDRESS=0.0.0.0") == [served]
    assert makefile.make("test") == [TEST, *CHECKS]
    assert makefile.make("test") == CHECKS
    assert makefile.make("app") == [SERVE]


def test_tests_install_all_that_the_app_needs_until_requirements_change(makefile: Makefile) -> None:
    assert makefile.make("test") == ["venv", TORCH, TEST, *CHECKS]
    assert makefile.make("app") == [SERVE]
    later = (makefile.folder / ".venv/stamps/test").stat().st_mtime + 5
    os.utime(makefile.folder / "pyproject.toml", (later, later))
    assert makefile.make("app") == [APP, SERVE]


def test_other_index_installs_torch_anew(makefile: Makefile) -> None:
    assert makefile.make("app") == ["venv", TORCH, APP, SERVE]
    assert makefile.make("app", "TORCH_INDEX=https://one") == [GONE, from_index("https://one"), APP, SERVE]
    assert makefile.make("app", "TORCH_INDEX=https://one") == [SERVE]
    assert makefile.make("app") == [SERVE]
    assert makefile.make("app", "TORCH_INDEX=https://two") == [GONE, from_index("https://two"), APP, SERVE]
    assert makefile.make("app", "TORCH_INDEX=") == [GONE, TORCH, APP, SERVE]
    assert makefile.make("app", "TORCH_INDEX=") == [SERVE]


@pytest.mark.parametrize(("failing", "left"), [("torch", [TORCH, TEST]), ("[app,test]", [TEST])])
def test_failed_installation_is_made_up_for(makefile: Makefile, failing: str, left: list[str]) -> None:
    (makefile.folder / "fails").write_text(failing)
    assert PYTEST not in makefile.make("test", fails=True)
    assert makefile.make("test", fails=True)[0] == left[0]
    (makefile.folder / "fails").unlink()
    assert makefile.make("test") == [*left, *CHECKS]


@pytest.mark.parametrize(("again", "install"), [(["TORCH_INDEX=https://one"], from_index("https://one")), ([], TORCH)])
def test_failed_change_of_index_is_made_up_for(makefile: Makefile, again: list[str], install: str) -> None:
    makefile.make("app")
    (makefile.folder / "fails").write_text("--index-url")
    assert makefile.make("app", "TORCH_INDEX=https://one", fails=True) == [GONE, from_index("https://one")]
    (makefile.folder / "fails").unlink()
    assert makefile.make("app", *again) == [install, APP, SERVE]


def test_failing_checks_fail_the_target(makefile: Makefile) -> None:
    makefile.make("test")
    python = makefile.folder / ".venv/bin/python"
    python.write_text(STAND_IN.replace('*) shift; echo "run', '*mypy*) exit 1 ;;\n    *) shift; echo "run'))
    assert makefile.make("test", fails=True) == CHECKS[:2]


def test_environment_whose_python_is_gone_is_made_anew(makefile: Makefile) -> None:
    makefile.make("app")
    python = makefile.folder / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    assert makefile.make("app") == ["venv", TORCH, APP, SERVE]


def test_a_python_that_does_not_suffice_is_refused(makefile: Makefile) -> None:
    (makefile.folder / "old").touch()
    assert makefile.make("app", fails=True) == []
    assert "No Python 3.11 or newer was found; install one" in makefile.done.stderr
    (makefile.folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(makefile.bin / "python3", makefile.folder / ".venv/bin/python")
    assert makefile.make("app", fails=True) == []
    assert "holds a Python older than 3.11; run 'make clean' first." in makefile.done.stderr
    shutil.rmtree(makefile.folder / ".venv")
    (makefile.folder / "old").rename(makefile.folder / "bare")
    assert makefile.make("app", fails=True) == []
    assert "lacks venv or ensurepip; install them" in makefile.done.stderr


def test_chosen_python_comes_first(makefile: Makefile) -> None:
    chosen = makefile.folder / "python-of-mine"
    shutil.move(makefile.bin / "python3", chosen)
    assert makefile.make("app", f"PYTHON={chosen}")[0] == "venv"


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_do_not_spin_unless_they_are_told_to(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before is not None:
        environment["OMP_WAIT_POLICY"] = before
    # Whatever is started: torch must not be loaded before the policy is set, since it is read then.
    script = "import gradinv.cli, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [after, "False"]
