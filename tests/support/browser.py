"""A headless Chromium that opens pages from disk: sizes, light and dark, sliders, clicks, pixels of a canvas, requests.

Chromium and chromedriver are Debian's packages `chromium` and `chromium-driver`, selenium is one of the `test` extra;
without them a test skips and says which is absent.
"""

import base64
import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = ("file:", "data:", "blob:", "about:")


class Browser:
    """One page at a time, 1280 x 900 pixels and light until `resize`.

    driver: selenium's WebDriver; further arguments of scripts arrive in JavaScript as arguments[0] and so on.
    """

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1280, height=900, dark=False):
        """Open an HTML file by its file:// address and wait until it is drawn; earlier logs are forgotten."""
        self.logs()
        self.resize(width, height, dark=dark)
        self.driver.get(Path(path).resolve().as_uri())
        # at the load event the page before may still be the active one, and a screenshot ends "aborted by navigation"
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def resize(self, width, height, *, dark=False, touch=False):
        """Set the size of the window in CSS pixels, the preferred color scheme, and whether it is a touch screen."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script, *arguments):
        """Run JavaScript and return the value of its `return`."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script, seconds=30):
        """Wait until JavaScript returns something true; raises after so many seconds."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda driver: driver.execute_script(script))

    def find(self, selector):
        """Return the first element of a CSS selector; one that is missing raises."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        """Return the visible text of an element."""
        return self.find(selector).text

    def click(self, selector, x=None, y=None):
        """Press and release the mouse on an element, at x, y in CSS pixels from its upper left corner or its center."""
        from selenium.webdriver import ActionChains

        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        if x is None:
            ActionChains(self.driver).move_to_element(element).click().perform()
            return
        width, height = self.run(
            "const box = arguments[0].getBoundingClientRect(); return [box.width, box.height]", element
        )
        # selenium counts from the center, in whole pixels from its floor
        offset = round(x - width // 2), round(y - height // 2)
        ActionChains(self.driver).move_to_element_with_offset(element, *offset).click().perform()

    def slide(self, selector, steps):
        """Move a slider by the keyboard to its minimum plus a number of steps."""
        from selenium.webdriver import Keys

        self.find(selector).send_keys(Keys.HOME + Keys.ARROW_RIGHT * steps)

    def choose(self, selector, value):
        """Choose the option of a <select> by its value."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(str(value))

    def canvas(self, selector):
        """Return the pixels of a <canvas> at its own size, uint8 [H, W, 4]."""
        width, height, text = self.run(
            """
            const canvas = document.querySelector(arguments[0]), copy = document.createElement("canvas");
            Object.assign(copy, {width: canvas.width, height: canvas.height});
            const context = copy.getContext("2d", {willReadFrequently: true});  // else Chromium warns of slow reading
            context.drawImage(canvas, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let text = "";
            for (let i = 0; i < data.length; i += 32768)
                text += String.fromCharCode.apply(null, data.subarray(i, i + 32768));
            return [canvas.width, canvas.height, btoa(text)];
            """,
            selector,
        )
        return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(height, width, 4)

    def screenshot(self, path=None, *, whole=False):
        """Return the window, or the whole page, as drawn: uint8 [H, W, 3]; also written to `path` as PNG."""
        options = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
        if path is not None:
            Path(path).write_bytes(data)
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))

    def overflow(self):
        """Return by how many CSS pixels the page is wider than the window: 0 unless it scrolls sideways."""
        return self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def logs(self):
        """Return what the page said since the last call: errors of the console, and addresses that it requested."""
        errors = [f"{line['level']}: {line['message']}" for line in self.driver.get_log("browser")]
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # Chromium's own first page ends loading whenever it likes
        requests = [each["request"]["url"] for each in sent if each["documentURL"].startswith("file:")]
        return errors, requests

    def check(self):
        """Assert that since `open` the console said nothing and nothing was requested but files and inline data."""
        errors, requests = self.logs()
        assert not errors, errors
        outside = [address for address in requests if not address.startswith(OFFLINE)]
        assert requests and not outside, outside


@contextlib.contextmanager
def browser(folder):
    """Provide a Browser, its profile in a folder of the test; skips the test where a part is absent."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is absent: pip install 'maskwise[test]'")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium or its driver is absent: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    switches = ["headless=new", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", "force-color-profile=srgb"]
    switches += ["disable-background-networking", f"user-data-dir={folder}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chromium's sandbox does not start as root
        switches.append("no-sandbox")
    for switch in switches:
        options.add_argument(f"--{switch}")
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(started)
    finally:
        started.quit()
