"""A real browser: Debian's chromium, driven by its chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


def _missing() -> str | None:
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt install chromium chromium-driver)"
    for module in ("selenium", "axe_core_python"):
        if find_spec(module) is None:
            return f"{module} is not installed (pip install the extra `dev`)"
    return None


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    """Return one browser for all tests; skip where there is none."""
    if reason := _missing():
        pytest.skip(f"needs a browser: {reason}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # in a container, and we show it nothing but our own page
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--force-color-profile=srgb",
        "--lang=en-GB",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """Return the browser as new: a desktop's size, light, no cookies, an empty console."""
    look(chromium)
    chromium.get("about:blank")
    chromium.delete_all_cookies()
    chromium.get_log("browser")  # type: ignore[no-untyped-call]
    yield chromium
    chromium.get("about:blank")


def look(browser: Chrome, width: int = 1280, height: int = 1000, scheme: str = "light") -> None:
    """Set the size of the window, in CSS pixels, and the colour scheme that is preferred."""
    features: list[dict[str, Any]] = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
