"""The architecture of docs: imports point down, the attack does not see what only its audience may see."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Lowest first. A module may import from the layers below its own, and from its own as long as nothing goes in circles.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(f"gradinv.{name}" if name not in ("gradinv", "app") else name for name in names.split())
    for names in (
        "gradinv errors names paths",
        "types",
        "config downloads images weights",
        "models",
        "network backbones",
        "batchnorm prior",
        "recovery",  # what the gradient says without a search
        "execution",  # how an evaluation is run
        "checks",
        "attack",  # what is searched for
        "client defenses",  # who shares the gradient
        "sources",
        "gallery",
        "metrics",  # what only the audience sees
        "figures pace breaching",
        "recording",  # a run, written down
        "animation benchmark evaluation jobs",
        "cli",
        "web",
        "web.host",  # what the server does beside running the pages
        "web.parts",  # what pages are made of
        "web.run",  # a run on the page
        "web.pages",
        "web.site",
        "__main__",
        "app",
    )
)

# Each in one layer.
PACKAGES = tuple(
    f"gradinv.{name}"
    for names in ("attack cli evaluation execution recording recovery", "web.host web.parts web.run web.pages web.site")
    for name in names.split()
)

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*ROOT.glob("gradinv/**/*.py"), *ROOT.glob("app.py")])
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: at the top, in functions, for the type checker only."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the package, or from one of those above it
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            # `from gradinv import metrics` imports a module, `from gradinv.types import Snapshot` does not.
            names |= {name if (name := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return names


IMPORTS = {module: imported(path) for module, path in FILES.items()}


def layer(module: str) -> int:
    parent = next((package for package in PACKAGES if module.startswith(f"{package}.")), module)
    found = [index for index, modules in enumerate(LAYERS) if parent in modules]
    assert found, f"{module} is in none of the layers: say here where it belongs"
    return found[0]


def below(module: str, imports: dict[str, set[str]]) -> set[str]:
    """All modules of the project that a module needs, directly or not."""
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        new = {name for item in waiting for name in imports[item] if name in imports} - seen
        seen |= new
        waiting = new
    return seen


def outside(module: str) -> set[str]:
    return {name.split(".")[0] for name in IMPORTS[module]}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    upward = {name for name in IMPORTS[module] if name in FILES and layer(name) > layer(module)}
    assert not upward, f"{module} imports from above: {sorted(upward)}"


@pytest.mark.parametrize("module", FILES)
def test_no_import_goes_in_circles(module: str) -> None:
    assert module not in below(module, IMPORTS)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith(("gradinv.attack", "gradinv.recovery"))])
def test_the_attack_does_not_see_client_metrics_or_sources(module: str) -> None:
    assert not below(module, IMPORTS) & {"gradinv.client", "gradinv.metrics", "gradinv.sources"}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("gradinv.web.pages.")])
def test_no_page_imports_a_page(module: str) -> None:
    assert not {name for name in IMPORTS[module] if name.startswith("gradinv.web.pages.")}


def test_streamlit_stays_in_the_web_package_and_the_app() -> None:
    users = {module for module in FILES if "streamlit" in outside(module)}
    assert "app" in users
    assert {module for module in users - {"app"} if not module.startswith("gradinv.web.")} == set()


def test_imports_within_functions_and_through_other_modules_are_seen() -> None:
    """Without which the rules above would hold nothing."""
    assert "gradinv.types" in IMPORTS["gradinv.cli.say"] and "plotly" in outside("gradinv.evaluation.table")
    assert "gradinv.types" in below("gradinv.__main__", IMPORTS) and "gradinv.types" not in IMPORTS["gradinv.__main__"]


def test_app_holds_no_tensors() -> None:
    assert not outside("app") & {"torch", "torchvision", "numpy"}


def test_importing_the_package_is_light() -> None:
    code = "import sys, gradinv; print(sorted(sys.modules.keys() & {'torch', 'numpy', 'PIL', 'streamlit'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
