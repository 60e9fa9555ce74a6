"""What an address can ask for: what is taken in another form, what is refused and said, and that nothing else is."""

from __future__ import annotations

import pytest

from gradinv.web.parts import lessons, settings, tour
from gradinv.web.site import address
from gradinv.web.site.address import honoured

LESSONS = ("labels", "batch", "defences", "layers")


@pytest.mark.parametrize(
    ("page", "name", "given", "kept"),
    [
        ("defences", "noise", "0.01", "1e-2"),
        ("live", "noise", "0.001", "1e-3"),
        ("defences", "clip", "1.0", "1"),
        ("labels", "batch_size", "8.0", "8"),
        ("layers", "side", "128", "128"),
        ("live", "size", "128", "128"),
        ("live", "set_tv", "0.25", "0.25"),
    ],
)
def test_a_number_may_be_written_in_another_way(page: str, name: str, given: str, kept: str) -> None:
    assert honoured(page, {name: given}) == ({name: kept}, [])


@pytest.mark.parametrize(
    ("page", "name", "given", "said"),
    [
        ("defences", "noise", "5", "noise takes one of off, 1e-6"),
        ("defences", "noise", "nan", "noise takes one of"),
        ("labels", "batch_size", "99", "batch_size takes a whole number from 1 to 20"),
        ("labels", "batch_size", "-inf", "batch_size takes a whole number"),
        ("live", "size", "99", "size takes one of 64, 96, 128"),
        ("live", "model", "vgg", "model takes one of resnet50-tiny"),
        ("live", "seeds", "1e999", "seeds takes a whole number from 1 to 32"),
        ("live", "set_tv", "-1", "set_tv takes a number of at least 0"),
        ("live", "set_match", "L3", "set_match takes one of l2"),
        ("batch", "among", "attic", "among takes one of samples"),
        ("how", "anything", "inf", "anything=inf, which no setting takes"),
    ],
)
def test_what_cannot_be_honoured_is_taken_out_and_said(page: str, name: str, given: str, said: str) -> None:
    kept, notices = honoured(page, {name: given, "kept": "as it is"})
    assert kept == {"kept": "as it is"}
    assert len(notices) == 1 and said in notices[0]


def test_pictures_that_the_gallery_lacks_are_named_and_the_others_kept() -> None:
    kept, notices = honoured("live", {"pictures": "lion.unicorn.goldfish"})
    assert kept["pictures"] == "lion.goldfish" and "no picture called unicorn" in notices[0]


def test_a_lessons_batch_size_has_an_old_name_and_is_not_the_side_of_lives_pictures() -> None:
    assert honoured("labels", {"size": "4"}) == ({"batch_size": "4"}, [])
    assert honoured("labels", {"size": "64", "batch_size": "5"}) == ({"batch_size": "5"}, [])
    shared = set(address.rules("live")) & {name for page in LESSONS for name in address.rules(page)}
    assert shared == set(lessons.STRENGTHS), "a widget's value follows its name from page to page"


def test_a_long_value_is_not_repeated_in_full() -> None:
    _, notices = honoured("live", {"model": "x" * 10_000})
    assert len(notices[0]) < 300


def test_the_defaults_of_every_page_and_the_steps_of_the_tour_are_honoured() -> None:
    usual = {"model": settings.MODEL, "size": str(settings.SIZE), "preset": settings.PRESET}
    assert honoured("live", usual) == (usual, [])
    for page in LESSONS:
        assert honoured(page, {"network": lessons.NETWORKS[0], "batch_size": "4", "draw": "0"})[1] == []
        assert set(address.rules(page)) >= {"network", "batch_size", "draw"}
    for step in tour.STEPS:
        assert honoured({"Defences": "defences"}.get(step.page, ""), step.address)[1] == []
