"""The page in Chromium: sliders, clicks and keys; drawn pixels against numpy; sizes, light and dark; no network."""

import numpy as np
import pytest
from matplotlib import colormaps

from maskwise.evaluation.look.maps import maps_of
from maskwise.evaluation.look.page import Settings, pack, page
from support.browser import browser
from support.looked import image, vit

pytestmark = pytest.mark.slow
POINT = (0.35, 0.9)  # in row 5, column 3 of 6 x 10 patches


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A page of two images in the browser, what it was made of, and its file."""
    folder = tmp_path_factory.mktemp("page")
    with browser(folder / "profile") as window:
        encoder = vit()
        maps = [
            maps_of(encoder, image(48, 80), "wide.png", 0, side=64),
            maps_of(encoder, image(64, 48, 3), "tall.png", 1),
        ]
        packed = [pack(each, 2) for each in maps]
        file = folder / "look.html"
        file.write_text(page(packed, Settings("A model", "of a test", "block", 0.4, 0.7, POINT)), encoding="utf-8")
        yield window, maps, packed, file


@pytest.fixture
def window(opened):
    """The page as it opens; at the end the console has said nothing and nothing came from the network."""
    here, _, _, file = opened
    here.open(file)
    here.wait("return document.body.dataset.shown === '0'")
    yield here
    here.check()


def centers(window, card, grid=(6, 10)):
    """The colors of a canvas in the middle of each patch, int [h, w, 3]."""
    pixels = window.canvas(f"#card-{card} canvas")
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(grid, pixels.shape))
    return pixels[rows][:, columns, :3].astype(int)


def caption(window, card):
    return window.text(f"#card-{card} figcaption output")


def stored(packed, row):
    """A map as the page has it, float64 [N]."""
    return packed.facts["map_scales"][row] * (packed.arrays["maps"][row] / 255.0) ** 2


def hot(values, grid=(6, 10)):
    """The colors of a map from its minimum to its maximum, int [h, w, 3]."""
    share = (values - values.min()) / (values.max() - values.min())
    levels = np.minimum(255, np.floor(share * 256)).astype(int)
    return colormaps["inferno"](levels, bytes=True)[:, :3].reshape(*grid, 3).astype(int)


def fewest(values, share):
    """The largest values that hold a share of the sum, bool [N]."""
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(values[order]) - values[order]
    chosen = np.zeros(len(values), bool)
    chosen[order[before < share * values.sum() * (1 - 1e-12)]] = True
    return chosen


def test_attention_of_the_chosen_block_and_head(opened, window):
    _, maps, packed, _ = opened
    window.slide("#opacity", 100)
    assert caption(window, "attention") == "block 3, 2 heads merged"
    assert np.array_equal(centers(window, "attention"), hot(stored(packed[0], 6)))
    window.slide("#layer", 1)
    window.slide("#head", 2)
    assert caption(window, "attention") == "block 2, head 2"
    assert np.array_equal(centers(window, "attention"), hot(stored(packed[0], 5)))
    true = maps[0].layers[1].heads[1].double().numpy()
    assert np.abs(centers(window, "attention") - hot(true)).mean() < 4, "the map itself, but for its bytes"
    left = window.text("#card-attention .scale span:first-child")
    assert float(left.removesuffix(" %")) == pytest.approx(100 * true.min(), rel=0.1, abs=1e-3)
    window.click('#atlas [data-place="0,1"]')
    assert caption(window, "attention") == "block 1, head 1"
    assert np.array_equal(centers(window, "attention"), hot(stored(packed[0], 1)))
    window.slide("#opacity", 50)
    below = centers(window, "image")
    assert np.abs(centers(window, "attention") - (below + hot(stored(packed[0], 1))) / 2).max() <= 2


def test_mass_follows_its_slider_and_the_attention_shown(opened, window):
    _, maps, packed, _ = opened
    for layer, head, mass in ((2, 0, 60), (0, 2, 25)):
        window.slide("#layer", layer)
        window.slide("#head", head)
        window.slide("#mass", mass - 1)
        chosen = fewest(stored(packed[0], 3 * layer + head), mass / 100)
        assert caption(window, "mass") == f"{chosen.sum()} of 60 patches"
        below = centers(window, "image")
        red = 0.45 * below + 0.55 * np.array([214, 40, 40])
        wanted = np.where(chosen.reshape(6, 10, 1), red, below)
        assert np.abs(centers(window, "mass") - wanted).max() <= 2
        true = maps[0].layers[layer]
        true = (true.heads[head - 1] if head else true.merged).double().numpy()
        other = fewest(true, mass / 100) ^ chosen
        assert true[other].sum() <= 0.02 * true.sum(), "bytes move patches of little mass alone"


@pytest.mark.parametrize("name", ["attmask_high", "attmask_low", "attmask_hint", "block", "random"])
def test_masks_are_those_of_the_maskings_at_the_slider(opened, window, name):
    maps = opened[1][0]
    assert caption(window, "mask") == f"{int(maps.masks['block'][40].sum())} of 60 patches", "as the page was made"
    window.click(f'#maskings [data-name="{name}"]')
    for ratio in (63, 30):
        window.slide("#ratio", ratio)
        mask = maps.masks[name][ratio].numpy()
        assert caption(window, "mask") == f"{mask.sum()} of 60 patches" and window.text("#ratio-value") == f"{ratio} %"
        below = centers(window, "image")
        gray = 0.08 * below + 0.92 * np.array([118, 118, 124])
        assert np.abs(centers(window, "mask") - np.where(mask.reshape(6, 10, 1), gray, below)).max() <= 2


def test_similarity_to_the_patch_under_a_click_and_keys(opened, window):
    _, maps, packed, _ = opened
    window.slide("#opacity", 100)
    assert caption(window, "similarity") == "patch 5, 3", "the point of the settings"
    size = window.run("const c = document.querySelector('#card-colors canvas'); return [c.clientWidth, c.clientHeight]")
    for card, row, column in (("colors", 0, 9), ("image", 4, 2)):
        window.click(f"#card-{card} canvas", (column + 0.5) * size[0] / 10, (row + 0.5) * size[1] / 6)
        assert caption(window, "similarity") == f"patch {row}, {column}"
        patch = 10 * row + column
        cosines = packed[0].codes.cosines(patch).numpy()
        assert np.array_equal(centers(window, "similarity"), hot(cosines))
        true = (maps[0].tokens.double() @ maps[0].tokens[patch].double()).numpy()
        assert np.abs(cosines - true).max() < 0.02
        texts = [window.text(f"#card-similarity .scale span:{end}-child") for end in ("first", "last")]
        assert [float(text) for text in texts] == pytest.approx([true.min(), true.max()], abs=0.02)
    window.find("#card-image canvas").send_keys("\ue014\ue013")  # right, up
    assert caption(window, "similarity") == "patch 3, 3"
    mark = window.run(
        "return ['x', 'y', 'width'].map(k => +document.querySelector('#card-mask .cell').getAttribute(k))"
    )
    assert mark == [24, 24, 8]


def test_components_and_boxes(opened, window):
    from maskwise.evaluation.look.codes import colors

    maps, packed = opened[1:3]
    colored = colors([each.codes for each in packed])[0].reshape(6, 10, 3).numpy()
    assert np.array_equal(centers(window, "colors"), colored)
    places = "return [...document.querySelectorAll('#card-image rect.box:not(.halo)')].map(r => [r.classList[1], " + (
        "...['x', 'y', 'width', 'height'].map(k => +r.getAttribute(k))])"
    )
    drawn = {name: box for name, *box in window.run(places)}
    assert set(drawn) == set(maps[0].boxes)
    for name, (x0, y0, x1, y1) in maps[0].boxes.items():
        assert drawn[name] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)
    window.click("#boxes input")
    assert len(window.run(places)) == len(drawn) - 1


def test_the_second_image_by_slider_and_strip(opened, window):
    packed = opened[2][1]
    window.slide("#opacity", 100)
    window.slide("#frame", 1)
    window.wait("return document.body.dataset.shown === '1'")
    assert caption(window, "image") == "tall.png, 48 x 64" and window.text("#frame-name") == "2 of 2: tall.png"
    grid = tuple(packed.facts["grid"])
    assert np.array_equal(centers(window, "attention", grid), hot(stored(packed, 6), grid))
    window.click("#strip button")
    window.wait("return document.body.dataset.shown === '0'")
    assert caption(window, "image") == "wide.png, 80 x 48"


def test_light_and_dark_by_system_and_button_and_no_sideways_scrolling(opened):
    window, _, _, file = opened
    paper = {}
    for dark in (False, True):
        for width in (390, 768, 1280):
            window.open(file, width=width, height=844, dark=dark)
            window.wait("return document.body.dataset.shown === '0'")
            assert window.overflow() == 0, width
            paper[dark] = int(window.screenshot()[-2, 1].mean())
            lefts = "[...document.querySelectorAll('figure')].map(each => each.getBoundingClientRect().left)"
            columns = len(set(window.run(f"return {lefts}")))
            assert columns == {390: 1, 768: 2, 1280: 3}[width]
    assert paper[False] > 220 and paper[True] < 50
    window.click("#theme")
    assert window.text("#theme") == "light" and window.screenshot()[-2, 1].mean() > 220
    window.click("#theme")
    assert window.text("#theme") == "dark" and window.screenshot()[-2, 1].mean() < 50
    window.check()
