"""The page in headless Chromium: nothing is said or requested; sizes, schemes, values under the pointer, pictures."""

import numpy as np
import pytest

from maskwise.report.page import write_page
from support.browser import browser
from support.run_folders import records_of, run_folder

pytestmark = pytest.mark.slow
LONG = "a_run_with_a_name_that_is_longer_than_the_screen_of_any_phone_" * 2


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    remark = "a remark with a_word_that_is_longer_than_the_screen_of_any_phone_" * 3
    run_folder(folder / LONG, alarm=remark, pictures=(8, 100, 200))
    run_folder(folder / "b", "optimizer.lr=1e-3", "masking.ratio=0.2", steps=20, pictures=(5,))
    write_page([folder / LONG], folder / "one.html")
    write_page([folder / LONG, folder / "b"], folder / "two.html")
    return folder


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_window_and_is_silent(chromium, folder, name, width):
    chromium.open(folder / f"{name}.html", width=width)
    assert chromium.overflow() <= 0
    sizes = chromium.run("return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(sizes) >= 7 and min(sizes) > 250 and max(sizes) <= width
    text = "return Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    assert chromium.run(text) >= 9, "labels are legible"
    chromium.check()


def paper(chromium):
    return tuple(int(value) for value in chromium.screenshot()[2, 2])


def test_schemes_follow_the_system_and_the_button(chromium, folder):
    chromium.open(folder / "one.html", dark=True)
    chromium.run("localStorage.clear()")
    chromium.open(folder / "one.html")
    assert paper(chromium) == (255, 255, 255) and chromium.text("#theme") == "Dark"
    stroke = "return getComputedStyle(document.querySelector('svg path[style*=\"--c0\"]')).stroke"
    light = chromium.run(stroke)
    chromium.click("#theme")
    assert paper(chromium) == (22, 22, 26) and chromium.text("#theme") == "Light"
    assert chromium.run(stroke) != light
    chromium.open(folder / "one.html")  # remembered
    assert paper(chromium) == (22, 22, 26)
    chromium.run("localStorage.clear()")
    chromium.open(folder / "one.html", dark=True)
    assert paper(chromium) == (22, 22, 26)
    chromium.click("#theme")
    assert paper(chromium) == (255, 255, 255)
    chromium.run("localStorage.clear()")
    chromium.check()


def loss_chart(chromium):
    """Return the selector of the chart of the loss."""
    number = chromium.run(
        "return [...document.querySelectorAll('figure[data-chart]')]"
        ".find(figure => figure.querySelector('h3').textContent === 'Training loss').dataset.chart"
    )
    return f"figure[data-chart='{number}']"


def test_the_pointer_shows_the_values_of_its_step(chromium, folder):
    chromium.open(folder / "one.html")
    chart = loss_chart(chromium)
    width = chromium.run(f'return document.querySelector("{chart} svg").getBoundingClientRect().width')
    across = (48 + (400 - 48 - 10) * 30 / 40) * width / 400  # step 30 of 40 in the frame of the view box
    chromium.click(f"{chart} svg", across, 60)
    [record] = [record for record in records_of(folder / LONG) if record["step"] == 30 and "loss" in record]
    lines = chromium.text("#tip").splitlines()
    assert lines[0] == "step 30"
    assert lines[1:] == [
        f"{name}: {record[key]:.4g}"
        for name, key in (("loss", "loss"), ("loss of the CLS token", "cls"), ("loss of masked patches", "patch"))
    ]
    chromium.click("h1")  # away from the chart
    assert not chromium.find("#tip").is_displayed()
    chromium.find(chart).send_keys("\ue014")  # arrow right
    assert chromium.text("#tip").splitlines()[0] == "step 32"
    chromium.find(chart).send_keys("\ue00c")  # escape
    assert not chromium.find("#tip").is_displayed()
    chromium.check()


def test_the_slider_chooses_the_picture_beside_the_first(chromium, folder):
    chromium.open(folder / "one.html")
    shown = "return [...document.querySelectorAll('.film figure')].filter(f => !f.hidden).map(f => f.dataset.step)"
    assert chromium.run(shown) == ["step 8", "step 200"]
    chromium.slide(".film input", 0)
    assert chromium.run(shown) == ["step 8", "step 100"]
    chromium.run("document.querySelectorAll('.film img')[1].scrollIntoView({block: 'center'})")
    box = chromium.run("const b = document.querySelectorAll('.film img')[1].getBoundingClientRect(); return [b.x, b.y]")
    pixel = chromium.screenshot()[int(box[1]) + 20, int(box[0]) + 20]
    np.testing.assert_allclose(pixel, (100, 100, 50), atol=6)
    chromium.check()
