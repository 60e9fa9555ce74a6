"""A run on paper: what stands there, for batches of each size."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gradinv.config import AttackConfig
from gradinv.web.parts import markup, summary
from gradinv.web.parts.markup import Row, Tile


def document(count: int = 1, table: str = "<table></table>", **settings: Any) -> str:
    run = {
        "config": AttackConfig(**settings).to_dict(),
        "model": {"name": "small", "sha256": "0" * 64},
        "environment": {"gradinv": "1", "torch": "2", "device": "cpu"},
    }
    rows = [Row("Consensus", [Tile("data:,", "one")] * count)]
    return summary.document("<title>", [("in all", "1 s")], "Solved: <all>.", rows, table, run, []).decode()


@pytest.mark.parametrize("count", range(1, markup.COLUMNS + 2))
def test_a_row_of_each_batch_has_its_columns(count: int) -> None:
    page = document(count)
    found = re.search(r'class="gi-board ([\w-]+)"', page)
    assert found is not None
    rule = re.search(rf"\.{found[1]} {{ (.*?); }}", page)
    assert rule is not None
    assert rule[1] == (f"--n: {count}" if count <= markup.COLUMNS else "grid-template-columns: repeat(8, 1fr)")


def test_it_says_all_that_the_attack_saw() -> None:
    assert "saw the gradient and the weights, never an original" in document(bn="approx", start="random")
    assert (
        "the weights, the batch’s own BN statistics and a first guess learned from public pictures, never"
        in document(bn="exact", start="decoder")
    )


def test_a_run_without_originals_has_no_numbers() -> None:
    assert "<h2>Numbers</h2>" in document() and "<h2>Numbers</h2>" not in document(table="")
    assert "<title>&lt;title&gt;</title>" in document() and "<p>Solved: &lt;all&gt;.</p>" in document()
