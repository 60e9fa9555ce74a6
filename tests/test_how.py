"""The page How it works: six pictures that the code computes, and what they must show."""

from __future__ import annotations

import re

import pytest
from headless import PATIENCE
from streamlit.testing.v1 import AppTest

from gradinv.web.pages import how


@pytest.fixture(scope="module")
def example() -> how.Example:
    return how.example()


def test_the_example_shows_what_the_words_beside_it_say(example: how.Example) -> None:
    # The labels are read from the most negative minima, and are those of the pictures.
    assert sorted(example.minima)[:4] == pytest.approx([example.minima[label] for label in example.restored])
    assert {example.classes[label] for label in example.restored} == {"goldfish", "tabby", "lion", "espresso"}
    # Only the originals have the client's gradient.
    shares, distances = [share for share, _, _ in example.path], [distance for _, _, distance in example.path]
    assert (shares[0], shares[-1], distances[-1]) == (0, 1, pytest.approx(0, abs=1e-3))
    assert min(distances[:-1]) > 1
    # Both priors prefer the pictures, and the registered mean is the sharper one.
    noise, shuffled, picture = example.priors
    assert picture.variation < min(noise.variation, shuffled.variation)
    assert picture.bn < min(noise.bn, shuffled.bn)
    assert example.registered[1] > example.lazy[1]
    assert min(example.cosines) > 0.999 and example.residual < 1e-4


def test_the_page_has_six_steps_with_their_equations_and_no_error() -> None:
    app = AppTest.from_function(_page, default_timeout=PATIENCE).run()
    assert not app.exception and not app.error
    assert [item.value for item in app.header][:6] == [f"{n}. {step.title}" for n, step in enumerate(how.STEPS, 1)]
    said = "\n".join(item.value for item in app.latex)
    assert re.findall(r"\\text\{\(([\d, ]+)\)\}", said) == ["1, 2", "8", "3", "9", "10", "11", "12"]
    boards = [item.value for item in app.markdown if "gi-board" in item.value]
    assert len(boards) == 5 and all('alt=""' not in board for board in boards)
    assert len(app.get("plotly_chart")) == 3


def _page() -> None:
    from gradinv.web.pages import how

    how.page()
