"""The chart of a sweep: its size, the marks of the best, and the length of bars."""

from __future__ import annotations

import numpy as np
import pytest
from legomole.core.merge.account import Prediction
from legomole.core.pictures.canvas import SERIES
from legomole.core.pictures.sweep import draw_sweep
from legomole.core.recipes.sweep import Candidate, Sweep

pytest.importorskip("PIL")


def swept(loras: int = 2, rows: int = 4) -> Sweep:
    candidates = tuple(
        Candidate("concat", "", 1 + i, Prediction("", (0.5,) * loras, 1.0, None), 0.25 * (i + 1)) for i in range(rows)
    )
    return Sweep(tuple(f"lora {i}" for i in range(loras)), (1.0,) * loras, None, candidates)


def pixels(sweep: Sweep) -> np.ndarray:
    return np.asarray(draw_sweep(sweep).convert("RGB"))


def test_bars_are_as_long_as_their_errors():
    """The loss of row i is 0.25 (i + 1): the pixels of the first colour in its row grow with it."""
    image = pixels(swept())
    colour = (image == SERIES[0]).all(2)
    rows = [colour[round(1.5 * (92 + 18 * i + 9)), 288:].sum() for i in range(4)]
    assert rows[0] > 5
    assert rows == pytest.approx([rows[0] * (i + 1) for i in range(4)], abs=4)


def test_the_best_are_marked():
    """Two strengths of one method are among the best, the other two are not."""
    image = pixels(swept())
    marks = [(image[round(1.5 * (92 + 18 * i + 9)), : round(1.5 * 22)] == SERIES[0]).all(1).any() for i in range(4)]
    assert marks == [True, True, False, False]


def test_many_loras_share_a_column():
    assert pixels(swept(7)).shape[1] < pixels(swept(6)).shape[1]
    assert pixels(swept(2, 6)).shape[0] - pixels(swept(2, 4)).shape[0] == 2 * 27
