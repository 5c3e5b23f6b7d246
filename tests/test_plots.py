"""The figures: what can be counted in them; the rest is looked at."""
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

import train_byol
from plots import plot_curves, plot_neighbors
from utils import read_constants


def test_the_curves_of_a_long_run_have_no_more_points_than_can_be_seen(tmp_path, monkeypatch):
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: lines.append((x, y)) or plot(axis, x, y, **style))
    rows = [{"epoch": i / 10, "spread": 0.1} | ({"loss": float(i)} if i else {})
            | ({"knn": 50.0, "probe": 50.0, "rank": 9.0} if i % 10_000 == 0 else {}) for i in range(30_000)]
    plot_curves(tmp_path / "curves.png", rows, read_constants(vars(train_byol), []))
    assert [len(x) for x, _ in lines] == [2000, 1875, 3, 3, 3] and (tmp_path / "curves.png").stat().st_size > 0
    assert all(y == pytest.approx(10 * x) for x, y in zip(*lines[0]))
    plot_curves(tmp_path / "empty.png", [], read_constants(vars(train_byol), []))
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_neighbours_of_few_images_of_classes_whose_names_are_text_whatever_they_hold(tmp_path, generator):
    """Half a formula, a name that is no UTF-8 and of which there is no image, and one that the font lacks."""
    pixels, labels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_neighbors(tmp_path / "x.png", pixels, labels, ["$\\frac{a$ ^_", "caf\udce9", "\u732b \U0001f408"],
                       {"an arm": torch.eye(3)}, generator, "run_$x_$")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_the_readmes_picture_is_drawn(tmp_path):
    method = runpy.run_path(str(Path(train_byol.__file__).parent / "images" / "method.py"))
    method["main"](tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size > 10_000
