"""The page without a browser: opened at an address, read, and what is on it pressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conftest import ROOT
from streamlit.testing.v1 import AppTest

from gradinv.jobs import JobState, manager

PATIENCE = 240.0  # seconds after which something hangs; nothing depends on how fast it is


def visit(**address: str) -> AppTest:
    """Open the page at an address, as a new visitor."""
    return opened(
        AppTest.from_file(str(ROOT / "gradinv" / "web" / "site" / "navigation.py"), default_timeout=PATIENCE), **address
    )


def opened(app: AppTest, **address: str) -> AppTest:
    for name, value in address.items():
        app.query_params[name] = value
    return sound(app.run())


def sound(app: AppTest) -> AppTest:
    assert not app.exception
    return app


def text(app: AppTest) -> str:
    """Everything that the page says in words."""
    kinds = (app.markdown, app.header, app.caption, app.info, app.warning, app.error, app.get("html"))
    return "\n".join(getattr(item, "value", None) or item.proto.body for kind in kinds for item in kind)


def address(app: AppTest) -> dict[str, str]:
    """The parameters of the page's address, which the headless run keeps as text or as a list of one."""
    return {name: value if isinstance(value, str) else value[-1] for name, value in app.query_params.items()}


def press(app: AppTest, label: str) -> AppTest:
    """Press the button that says so."""
    return sound(next(button for button in app.button if button.label == label).click().run())


def group(app: AppTest, key: str) -> Any:
    """The pills or segments whose key begins so."""
    return next(item for item in app.button_group if (item.key or "").startswith(key))


def wait(app: AppTest, until: Callable[[JobState], bool] = lambda state: state.finished) -> AppTest:
    """Let the page's job come that far, then let the page tick."""
    assert manager().wait(address(app)["job"], until, PATIENCE)
    return sound(app.run())
