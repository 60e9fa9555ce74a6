"""The guided tour, run headless: the way through it, what it carries along, and addresses that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import streamlit as st
from headless import address, sound, visit
from streamlit.testing.v1 import AppTest

from gradinv.web.pages import batch, defences, how, labels, layers, live, replay
from gradinv.web.parts import lessons, showcase, tour

PAGES = {
    "Live": live,
    "Replay": replay,
    "Labels": labels,
    "Who was in the batch?": batch,
    "Layer by layer": layers,
    "Defences": defences,
    "How it works": how,
}


def stand_in(title: str, module: ModuleType) -> Callable[[], None]:
    def page() -> None:
        st.header(title)
        if module is live:
            tour.entrance()
        if module is layers:
            st.slider("Batch size", 1, 16, 4, key="batch_size", bind="query-params")

    return page


@pytest.fixture(autouse=True)
def pages_that_compute_nothing(monkeypatch):
    """They say their names only."""
    for title, module in PAGES.items():
        monkeypatch.setattr(module, "page", stand_in(title, module))


def press(app: AppTest, *keys: str) -> AppTest:
    for key in keys:
        sound(app.button(key=f"tour-{key}").click().run())
    return app


def step(app: AppTest) -> str:
    """The banner's place; empty without one."""
    return next((item.value.split("</b> ")[1][:6] for item in app.markdown if "gi-tour" in item.value), "")


def test_next_leads_through_all_pages_in_order_and_out_of_the_tour():
    app = press(visit(), "begin")
    for number, one in enumerate(tour.STEPS, 1):
        assert [item.value for item in app.header] == [one.page]
        assert step(app) == f"{number} of 7"
        assert any(one.task in item.value for item in app.markdown)
        assert address(app) == {**one.address, "tour": str(number)}
        press(app, "next")
    assert [item.value for item in app.header] == ["Live"]
    assert step(app) == "" and address(app) == {}


def test_back_leads_back_and_end_ends_it_on_the_page():
    app = visit(tour="1")
    assert app.button(key="tour-back").disabled
    press(app, "next", "next", "back")
    assert [item.value for item in app.header] == ["Labels"] and step(app) == "2 of 7"
    press(app, "end")
    assert [item.value for item in app.header] == ["Labels"]
    assert step(app) == "" and "tour" not in app.query_params
    assert step(app.run()) == ""


def test_what_the_visitor_has_set_stays_where_the_tour_ends():
    app = press(visit(), "begin", "next", "next", "next")
    app.query_params["batch_size"] = "8"  # as the browser has it once the slider is moved
    app.slider(key="batch_size").set_value(8).run()
    assert address(press(app, "end")) == {"batch_size": "8"} and app.slider(key="batch_size").value == 8


def test_what_a_step_set_up_does_not_outlast_the_tour():
    to_the_sixth = ("begin", *["next"] * 5)
    app = press(visit(), *to_the_sixth)
    assert address(app) == {"clip": "1", "tour": "6"}
    assert address(press(app, "end")) == {} and app.session_state["clip"] == lessons.OFF
    app = press(visit(), *to_the_sixth)
    app.query_params["clip"] = "0.3"  # by the visitor's hand
    assert address(press(app.run(), "end")) == {"clip": "0.3"} and "clip" not in app.session_state


def test_a_number_that_is_not_the_pages_shows_the_pages_own_step():
    for number in ("0", "4", "two", "", "1e3", "²", "<b>", "9" * 300):
        app = visit(tour=number)
        assert not app.error
        assert step(app) == "1 of 7" and address(app) == {"tour": "1"}
    infinite = visit(tour="inf")  # is no tour
    assert step(infinite) == "" and "tour" not in infinite.query_params
    app.query_params.clear()  # as the navigation does
    app.run()
    assert step(app) == "1 of 7" and address(app) == {"tour": "1"}


def test_a_run_and_the_large_type_are_carried_along():
    app = visit(tour="1", job="mine")
    assert any(tour.OWN.words in item.value for item in app.markdown)
    assert "present" not in [button.key for button in app.button]  # the run's page has its own
    app.query_params["present"] = "1"
    assert not any(tour.OWN.words in item.value for item in app.run().markdown)
    press(app, "next")
    assert address(app) == {"tour": "2", "job": "mine", "present": "1"}
    assert any('class="gi-presenting"' in item.proto.body for item in app.get("html"))
    app.button(key="present").click().run()
    assert address(app) == {"tour": "2", "job": "mine"}
    assert not any('class="gi-presenting"' in item.proto.body for item in app.get("html"))
    assert address(press(app, "back")) == {"tour": "1", "job": "mine"}
    assert address(press(app, "next", "end")) == {}


def test_what_the_steps_promise_is_on_their_pages():
    assert sorted(one.page for one in tour.STEPS) == sorted(PAGES)
    addresses = {one.page: one.address for one in tour.STEPS}
    assert addresses["Replay"]["run"] in showcase.library() and "One picture or eight" in showcase.PAIRS
    assert addresses["Defences"]["clip"] in lessons.STRENGTHS["clip"][1]
    source = Path(how.__file__).read_text(encoding="utf-8")
    assert 'anchor="harder"' in source and 'anchor="ethics"' in source
