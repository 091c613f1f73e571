"""The contents of the plots of an adapter, read back from the figures."""

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from manifold_lora.inspection import plots
from manifold_lora.training.plot import plot_loss

pytestmark = pytest.mark.pictures


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    made = []

    class Recorded(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Recorded)
    return made


def lines(axes):
    return {tuple(line.get_xdata()): line.get_ydata() for line in axes.get_lines()}


def test_gram_maps_are_divided_by_their_mean_diagonal(figures, tmp_path):
    x = np.array([[4.0, 1], [1, 2]])
    rows = {
        "q_proj BᵀB": {0: x, 3: np.eye(3)},  # ranks may differ
        "v_proj BᵀB": {
            0: np.zeros((2, 2))
        },  # at initialisation; not adapted in layer 3
    }
    plots.plot_gram(tmp_path / "gram.png", rows, "costs $ and $")
    maps = figures[0].axes[:4]
    shown = [[i.get_array() for i in axes.get_images()] for axes in maps]
    np.testing.assert_allclose(shown[0], [x / 3])
    np.testing.assert_allclose(shown[1], [np.eye(3)])
    np.testing.assert_allclose(shown[2], [np.zeros((2, 2))])
    assert shown[3] == []
    assert all(i.get_clim() == (-1, 1) for axes in maps for i in axes.get_images())
    assert [axes.get_title() for axes in maps[:2]] == ["layer 0", "layer 3"]
    assert [axes.get_xlabel() for axes in maps] == ["r = 2", "r = 3", "", ""]
    assert [axes.get_ylabel() for axes in maps[::2]] == list(rows)
    assert r"costs \$ and \$" in figures[0].get_suptitle()


@pytest.mark.slow
def test_a_large_adapter_makes_a_readable_plot(figures, tmp_path):
    rows = {f"row {i}": dict.fromkeys(range(80), np.eye(2)) for i in range(40)}
    plots.plot_gram(tmp_path / "gram.png", rows, "")
    *maps, _ = figures[0].axes
    assert len(maps) == 16 * 8
    titles = [axes.get_title() for axes in maps[:8]]
    assert (titles[0], titles[-1]) == ("layer 0", "layer 79")
    height, width, _ = image.imread(tmp_path / "gram.png").shape
    assert max(height, width) < 2500


def test_spread_includes_the_ends():
    assert plots.spread([3, 4]) == [3, 4]
    assert plots.spread(range(10), 4) == [0, 3, 6, 9]


def test_effective_rank_over_layers(figures, tmp_path):
    panels = {
        "ΔW": {"q_proj": {1: 4.5, 0: 2.0}, "lm_head": {0: 1.0}},
        "B": {"q_proj": {0: 3.0, 1: 4.0}},
    }
    plots.plot_effective_rank(tmp_path / "rank.png", panels, 4, "")
    update, b = figures[0].axes
    np.testing.assert_allclose(lines(update)[0, 1], [2.0, 4.5])
    np.testing.assert_allclose(lines(update)[(0,)], [1.0])
    np.testing.assert_allclose(lines(b)[0, 1][:1], [3.0])
    assert (update.get_title(), b.get_title()) == ("ΔW", "B")
    assert update.get_ylim()[0] == 0 and update.get_ylim()[1] > 4.6
    (legend,) = figures[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["rank", "q_proj", "lm_head"]


def test_spectra(figures, tmp_path):
    panels = {
        "ΔW": {"q_proj": {0: [3.0, 1.0, 1e-9], 1: [2.0]}, "v_proj": {0: [1.0, 0.5]}},
        "B": {"q_proj": {0: [1.0, 1.0]}},
        "A": {"q_proj": {0: [0.0, 0.0]}},
    }
    plots.plot_spectra(tmp_path / "spectra.png", panels, "")
    grid = np.array(figures[0].axes[:6]).reshape(3, 2)
    # Values below float32 rounding are not drawn on the logarithmic axis.
    np.testing.assert_allclose(lines(grid[0, 0])[1, 2], [3.0, 1.0])
    np.testing.assert_allclose(lines(grid[0, 0])[(1,)], [2.0])
    np.testing.assert_allclose(lines(grid[0, 1])[1, 2], [1.0, 0.5])
    assert grid[0, 0].get_yscale() == "log"
    low, high = grid[1, 0].get_ylim()  # a flat spectrum is not drawn as noise
    assert low < 0.2 and high > 1
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["σ of ΔW", "σ of B", "A is 0"]
    assert [axes.get_title() for axes in grid[0]] == ["q_proj", "v_proj"]


def test_one_layer_has_no_colour_bar(figures, tmp_path):
    plots.plot_spectra(tmp_path / "one.png", {"ΔW": {"q_proj": {5: [1.0]}}}, "")
    assert len(figures[0].axes) == 1


def test_loss(figures, tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    rows += [{"step": 2, "eval_loss": 1.5}]
    plot_loss(tmp_path / "loss.png", rows, "a run")
    (axes,) = figures[0].axes
    np.testing.assert_allclose(lines(axes)[1, 2], [2.0, 1.0])
    np.testing.assert_allclose(lines(axes)[(2,)], [1.5])
