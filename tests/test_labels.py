from __future__ import annotations

import pytest
import torch

from gradinv.labels import column_minimum, restore_labels
from gradinv.types import GradinvError
from gradinv.victim import observe


def test_column_minimum_by_hand():
    # Rows are classes. Minima: 0.1, -0.5, -0.2, 0.0. A row's sum would have preferred class 2 to class 1.
    gradient = torch.tensor([[0.1, 0.3], [-0.5, 0.9], [-0.2, -0.2], [0.0, 0.2]])
    assert column_minimum(gradient, 1).tolist() == [1]
    assert column_minimum(gradient, 2).tolist() == [1, 2]
    assert column_minimum(gradient, 3).tolist() == [1, 2, 3]


def test_restores_every_label_of_a_batch(small_model, small_batch):
    pixels, labels = small_batch
    restored = restore_labels(small_model, observe(small_model, pixels, labels))
    assert sorted(restored.labels.tolist()) == [1, 2, 4]


@pytest.mark.parametrize("batch_size", [0, 5])
def test_batch_sizes_that_cannot_be_are_refused(batch_size):
    with pytest.raises(GradinvError, match="between 1 and the 4 classes"):
        column_minimum(torch.zeros(4, 2), batch_size)


def test_gradient_that_is_not_finite_is_refused():
    with pytest.raises(GradinvError, match="not finite"):
        column_minimum(torch.tensor([[0.0], [float("nan")]]), 1)
