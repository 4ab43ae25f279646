import numpy as np
from maskwise.functional import plots
from maskwise.functional.draw import PALETTE


def filled(picture, color):
    return (picture == np.array(color)).all(axis=-1)


def test_bars_are_as_long_as_their_values_and_fall():
    picture = plots.bars([25.0, 100.0, 50.0], ["a", "b", "c"])
    lengths = [filled(picture, PALETTE[0])[36 + row * 16].sum() for row in range(3)]
    assert lengths == [360, 180, 90]


def test_of_many_bars_the_best_and_the_worst_are_shown():
    picture = plots.bars(np.arange(100.0), [str(i) for i in range(100)], rows=4)
    lengths = [filled(picture, PALETTE[0])[36 + row * 16].sum() for row in range(4)]
    assert lengths == [round(3.6 * 99), round(3.6 * 98), round(3.6 * 1), 1]


def test_matrix_scales_rows_to_their_sum_and_keeps_the_orientation():
    table = np.array([[0, 10, 0], [0, 4, 0], [1, 0, 1]])
    picture = plots.matrix(table, ["a", "b", "c"], size=90).astype(int).sum(axis=-1)
    left = picture.shape[1] - 90 - 24
    cells = picture[48:138, left : left + 90].reshape(3, 30, 3, 30)[:, 2, :, 2]
    assert cells[0, 1] == cells[1, 1] == cells.max() and cells[0, 0] == cells[1, 0] == cells.min()
    assert cells.min() < cells[2, 0] == cells[2, 2] < cells.max()


def test_scatter_puts_points_where_they_are():
    picture = plots.scatter([[0, 0], [1, 1], [0, 1]], [0, 1, 2], ["a", "b", "c"], size=100)
    where = {label: np.argwhere(filled(picture[:, :113], PALETTE[label])).mean(axis=0) for label in range(3)}
    assert where[0][0] > where[1][0] and where[0][1] < where[1][1]  # (0, 0) is below and left of (1, 1)
    assert where[2][0] == where[1][0] and where[2][1] == where[0][1]


def test_every_label_has_its_own_colour():
    for count in (1, 7, 8, 100):
        assert len(np.unique(plots.shades(count), axis=0)) == count


def test_a_frame_covers_the_border_only():
    picture = plots.framed(np.zeros((64, 64, 3), dtype=np.uint8), (9, 8, 7))
    assert filled(picture, (9, 8, 7))[0].all() and not filled(picture, (9, 8, 7))[10:50, 10:50].any()
