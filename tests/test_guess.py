"""The guessing game: its answers, its points, and a game played on the page."""

from __future__ import annotations

import random

from streamlit.testing.v1 import AppTest

from gradinv.web.parts import guess
from gradinv.web.parts.guess import BLURS, Game

NAMES = [f"class {index}" for index in range(30)]


def test_the_right_answer_is_among_four_different_ones_which_stay_the_same() -> None:
    for place in range(20):
        found = guess.choices("run", place, "class 7", NAMES)
        assert len(set(found)) == 4 and "class 7" in found
        assert found == guess.choices("run", place, "class 7", NAMES)
    places = {guess.choices("run", place, "class 7", NAMES).index("class 7") for place in range(40)}
    assert places == {0, 1, 2, 3}  # its place gives nothing away


def test_each_level_of_clearness_costs_a_point_and_a_wrong_answer_has_none() -> None:
    game = Game("run", (4, 2, 9))
    game = game.answered("a", "a").clearer().clearer().answered("b", "b").answered("c", "d")
    assert game.points == (len(BLURS), len(BLURS) - 2, 0) and game.at == 3
    for _ in range(9):
        game = game.clearer()
    assert game.level == len(BLURS) - 1 and game.answered("e", "e").points[-1] == 1


def test_a_game_asks_for_different_pictures_and_no_more_than_there_are() -> None:
    assert sorted(guess.new("run", 3).places) == [0, 1, 2]
    assert len(set(guess.new("run", 30).places)) == guess.QUESTIONS


def test_a_game_is_played_to_its_score() -> None:
    app = AppTest.from_string("from gradinv.web.pages import replay\n\nreplay.page()", default_timeout=60)
    app.query_params["mode"], app.query_params["run"] = "guess", "four"
    app.run()
    assert not app.exception and not app.error
    generator = random.Random(0)
    for number in range(4):
        board = next(item.value for item in app.markdown if "gi-board" in item.value)
        assert board.count("<img") == 1
        right = app.session_state.game.run, app.session_state.game.places[number]
        before = board
        app.button(key="guess-clearer").click().run()
        assert next(item.value for item in app.markdown if "gi-board" in item.value) != before
        asked = [button for button in app.button if (button.key or "").startswith("guess-")]
        answers = [button for button in asked if button.key != "guess-clearer"]
        assert len(answers) == 4 and right[0] == "four"
        generator.choice(answers).click().run()
        assert not app.exception
    game = app.session_state.game
    assert len(game.points) == 4 and set(game.points) <= {0, len(BLURS) - 1}
    assert [item.value for item in app.subheader] == [f"{sum(game.points)} of {4 * len(BLURS)} points"]
    app.button(key="guess-again").click().run()
    assert app.session_state.game.at == 0
