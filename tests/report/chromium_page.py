"""What tests do with a page in the browser of conftest.py."""

from __future__ import annotations

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def click(browser, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def unfold(browser, selector: str, content: str) -> None:
    """Open the first of some questions or answers, and wait for what is in it."""
    click(browser, f"{selector} > summary")
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, f"{selector}[open] {content}"))


def choose(browser, selector: str, text: str) -> None:
    Select(browser.find_element(By.CSS_SELECTOR, selector)).select_by_visible_text(text)


def inks(browser) -> list[int]:
    """Number of colours in each plot of the page: one that is empty has a single one."""
    return browser.execute_script(
        """
        return [...document.querySelectorAll(".plot canvas")].map((canvas) => {
          const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
          copy.drawImage(canvas, 0, 0);
          const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        });
        """
    )


def luminance(browser, selector: str = "body") -> float:
    """0 for black, 1 for white: of an element's background."""
    colour = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor", selector
    )
    return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 765
