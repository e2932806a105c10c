"""Pages of `spell report` in a real browser: headless Chromium, driven through Selenium.

Skipped where there is no Chromium with its driver (Debian: `apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from simulated_run import make_evaluation, make_run

from spell_megatron.report.panels import sections
from spell_megatron.report.report import write_report

pytest.importorskip("selenium.webdriver", reason="needs the package selenium (extra dev)")

from chromium_page import choose, click, inks, luminance, texts, unfold
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>bold</b>"
MOST_PLOTS = sum(len(section.panels) for section in sections([], ["time/hidden"])) + 1  # and that of any metric


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of one run, whose policy writes HTML."""
    folder = tmp_path_factory.mktemp("one")
    write_report([make_run(folder / "hostile", 12, remark=HOSTILE)], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The report of two runs with different seeds, one twice as long, and one that has not begun."""
    folder = tmp_path_factory.mktemp("three")
    runs = [make_run(folder / "long", 12), make_run(folder / "short", 6, seed=1)]
    waiting = folder / "waiting"
    waiting.mkdir()
    (waiting / "config.yaml").write_text("run:\n  steps: 6\n")
    write_report([*runs, waiting], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """The report of a run and three evaluations: two of the paper's table with a judge, one of other benchmarks."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluations = [make_evaluation(folder / name, skill, judge="judge") for name, skill in (("a", 0.38), ("b", 0.47))]
    evaluations.append(make_evaluation(folder / "<b>c", 0.4, ("docmath", "mine"), samples=6))
    write_report([make_run(folder / "run", 3), *evaluations], folder / "report.html", transcripts=5)
    write_report(evaluations[:1], folder / "alone.html")
    return folder / "report.html"


def test_the_page_of_a_run_has_everything(show, page):
    browser = show(page)
    assert texts(browser, "nav a") == [
        "Overview", "Results", "Outcomes", "Curriculum", "Verifier", "Training", "Speed", "Metrics", "Transcripts"
    ]  # fmt: skip
    assert len(texts(browser, "main > section > h2")) == 9
    drawn, left_out = inks(browser), "".join(texts(browser, ".missing"))
    assert len(drawn) == MOST_PLOTS - len(re.findall("[:;] [A-Z]", left_out)) > 25 and min(drawn) > 10
    assert "Load of the experts; Routings changed by replay." in left_out
    values = texts(browser, ".legend .value")
    assert len(values) > len(drawn) and "NaN" not in "".join(values) and "undefined" not in "".join(values)
    assert "–" not in values  # every curve has a last value
    assert texts(browser, "#overview .card dd")[0] == "12 of 12"
    assert "held-out pass@1" in texts(browser, "#comparison tbody th")
    funnel = texts(browser, "#outcomes .funnel .values")
    assert funnel[0] == "100%" and len(funnel) == 6


def test_a_plot_shows_what_is_chosen(show, page):
    browser = show(page)
    first = "#results .panel:nth-child(3)"
    assert texts(browser, f"{first} h3") == ["Mean reward"]
    labels = [text.rstrip("0123456789.−") for text in texts(browser, f"{first} .legend button")]
    assert labels == ["questions", "answers", "judgments"]
    choose(browser, f"{first} select", "answers by task")
    labels = [text.rstrip("0123456789.−") for text in texts(browser, f"{first} .legend button")]
    assert labels == ["doc_general_qa", "docmath_qa"]
    before = inks(browser)
    click(browser, f"{first} .legend button")
    assert browser.find_element(By.CSS_SELECTOR, f"{first} .legend button").get_attribute("aria-pressed") == "false"
    assert inks(browser) != before
    choose(browser, "#metric", "history/clusters")
    assert texts(browser, "#metrics h3") == ["history/clusters"]
    assert min(inks(browser)) > 10
    assert "of single steps" in texts(browser, "#comparison caption")[0]
    choose(browser, "#window", "3 steps")
    assert "averaged over 3 steps" in texts(browser, "#comparison caption")[0]


def test_the_timeline_shows_some_steps_with_a_lane_for_trainer_and_engines(show, page, compared):
    browser = show(page)
    words = " ".join(texts(browser, ".timeline .about"))
    assert "Of all 12 steps" in words and "% of the update ran while the engines wrote" in words
    labels = [text.rstrip("0123456789%") for text in texts(browser, ".timeline .legend > span")]
    assert [label.strip() for label in labels] == ["rollout", "accumulate", "update", "push"]
    named = texts(browser, ".timeline .lanes > span")
    assert [text for text in named if text.startswith("step")] == [f"step {step} trainer" for step in range(9, 13)]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".timeline .lane")) == 8
    choose(browser, ".timeline select", "step 1")
    spoken = browser.find_element(By.CSS_SELECTOR, ".timeline .lane").get_attribute("aria-label")
    assert spoken.startswith("trainer in step 1: update: 11.0 s, from 16.0 s; push")
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.timeline .lane')].slice(0, 2).map((lane) => {"
        "const at = (element) => element.getBoundingClientRect();"
        "return [...lane.children].map((one) => [(at(one).left - at(lane).left) / at(lane).width,"
        " at(one).width / at(lane).width]);})"
    )
    (whole, update, _), (_, rollout, _) = drawn
    assert whole == pytest.approx([0, 1], abs=0.01)
    assert rollout == pytest.approx([0, 16 / 28], abs=0.01) and update == pytest.approx([16 / 28, 11 / 28], abs=0.01)
    assert texts(show(compared), ".timeline h3") == ["Timeline: long", "Timeline: short"]


def test_a_range_of_steps_is_enlarged_in_all_plots(show, page):
    browser = show(page)
    picture = "return document.querySelector('#curriculum canvas').toDataURL()"
    whole = browser.execute_script(picture)
    plot = browser.find_element(By.CSS_SELECTOR, "#results .u-over")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", plot)
    mouse = ActionChains(browser)
    mouse.move_to_element_with_offset(plot, -80, 0).click_and_hold().move_by_offset(120, 0).release().perform()
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(picture) != whole)
    ActionChains(browser).double_click(plot).perform()
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(picture) == whole)


def test_light_and_dark(show, page):
    assert luminance(show(page, scheme="light")) > 0.9
    browser = show(page, scheme="dark")
    assert luminance(browser) < 0.2 and luminance(browser, ".panel") < 0.2
    dark = browser.execute_script("return document.querySelector('.plot canvas').toDataURL()")
    choose(browser, "#theme", "light")
    assert luminance(browser) > 0.9
    assert browser.execute_script("return document.querySelector('.plot canvas').toDataURL()") != dark
    choose(browser, "#theme", "dark")
    assert browser.execute_script("return document.querySelector('.plot canvas').toDataURL()") == dark


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_of_a_narrow_window(show, compared, page, width):
    for file in (page, compared):
        browser = show(file, width=width)
        unfold(browser, ".question", ".answer")
        unfold(browser, ".answer", ".inner")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert (
            max(browser.execute_script("return [...document.querySelectorAll('canvas')].map((e) => e.clientWidth)"))
            < width
        )


def test_transcripts_are_filtered(show, page):
    browser = show(page)
    total = int(texts(browser, ".count")[0].split(" of ")[1].split()[0])
    assert total > 20

    def shown() -> int:
        return int(texts(browser, ".count")[0].split(" of ")[0])

    assert shown() == total
    choose(browser, "#filter-outcome", "bad format")
    assert 0 < shown() < total
    assert set(texts(browser, "#questions .chip")) == {"bad format"}
    choose(browser, "#filter-outcome", "all")
    choose(browser, "#filter-step", "12")
    choose(browser, "#filter-task", "docmath_qa")
    assert 0 < shown() < total
    assert {text.strip() for text in texts(browser, "#questions summary > .soft:first-child")} == {"step 12"}
    choose(browser, "#filter-step", "all")
    choose(browser, "#filter-task", "all")
    click(browser, "#against")
    assert 0 < shown() < total
    click(browser, "#against")
    question = texts(browser, "#questions .asked")[0]
    browser.find_element(By.ID, "search").send_keys(question[:30])
    assert 0 < shown() < total and {text[:30] for text in texts(browser, "#questions .asked")} == {question[:30]}
    browser.find_element(By.ID, "search").send_keys("no such words")
    assert shown() == 0


def test_a_question_opens_with_answers_and_judgments_as_plain_text(show, page):
    browser = show(page)
    choose(browser, "#filter-outcome", "mixed: right and wrong answers")
    unfold(browser, ".question", ".body")
    assert texts(browser, ".question[open] .body > dl dt")[:3] == ["Question", "Reference", "Reward"]
    question = texts(browser, ".question[open] .body > dl dd")[0]
    assert question.startswith("What is the ") and HOSTILE in question
    assert len(texts(browser, ".question[open] details.answer")) == 4
    unfold(browser, ".answer:has(.yes)", ".judgment")
    assert HOSTILE in texts(browser, ".answer[open] .inner > pre")[0]
    judgments = texts(browser, ".answer[open] .judgment pre")
    assert len(judgments) == 4 and all(HOSTILE in text for text in judgments)
    assert texts(browser, "main img, main b, main script") == []


def test_runs_are_compared(show, compared):
    browser = show(compared)
    assert texts(browser, "#overview h3")[:3] == ["longhide", "shorthide", "waitinghide"]
    assert "waiting" in texts(browser, "#comparison thead")[0]
    assert "run.seed" in texts(browser, ".settings tbody th")
    legend = "#results .panel:nth-child(1) .legend button"
    assert [text[:4] for text in texts(browser, legend)] == ["long", "shor"]
    assert min(inks(browser)) > 10
    choose(browser, "#results .panel:nth-child(1) select", "pass@4")
    assert texts(browser, "#outcomes .panel:nth-child(2) h3") == ["How far attempts come: short"]
    choose(browser, "#outcomes .panel:nth-child(3) select", "bad format")
    click(browser, "#overview .card:nth-child(2) button.show")
    assert browser.find_element(By.CSS_SELECTOR, f"{legend}:nth-of-type(2)").get_attribute("aria-pressed") == "false"
    assert "short" not in texts(browser, "#comparison thead")[0]
    choose(browser, "#filter-run", "short")
    assert len(texts(browser, "#questions .question")) > 0


def test_evaluations_stand_beside_the_run(show, evaluated):
    browser = show(evaluated)
    assert texts(browser, "nav a")[:3] == ["Overview", "Evaluation", "Results"]
    assert texts(browser, "#evaluation .card h3") == ["a", "b", "<b>c"]
    assert texts(browser, "#scores thead th") == ["", "DocMath", "Frames", "LB-MQA", "LB-V2", "Avg", "mine"]
    written = json.loads((evaluated.parent / "b" / "scores.json").read_text())

    def cell(estimate: dict[str, float]) -> str:
        return f"{100 * estimate['mean']:.1f} ({100 * estimate['low']:.1f}–{100 * estimate['high']:.1f})"

    def row(k: str, measure: str) -> list[str]:
        columns = [*written["columns"].values(), written["average"]]
        return ["b", *(cell(column[measure][k]) for column in columns), "–"]

    second = "#scores tbody tr:nth-child(2) > *"
    assert texts(browser, second) == row("pass@1", "score")
    assert texts(browser, "#scores tbody tr:nth-child(3) > *")[2:6] == ["–"] * 4
    assert len(texts(browser, "#scores .winner")) == 6 - 1  # `mine` is of one evaluation
    choose(browser, "#k", "pass@8")
    assert texts(browser, "#scores h3") == ["pass@8"] and texts(browser, second) == row("pass@8", "score")
    choose(browser, "#measure", "rule alone")
    assert texts(browser, second) == row("pass@8", "rule")
    assert texts(browser, "#scores tbody tr:nth-child(3) > *") == ["<b>c"] + ["–"] * 6  # it has six samples
    # 3 evaluations of docmath with two parts each, 5 benchmarks of two with two parts of one, and `mine`
    assert len(texts(browser, "#benchmarks tbody tr")) == 3 * 3 + 2 * (5 + 2) + 1
    assert texts(browser, "main b") == []


def test_plots_of_evaluations(show, evaluated):
    browser = show(evaluated)
    plots = inks(browser)[: len(texts(browser, "#evaluation .panel"))]
    assert texts(browser, "#evaluation .panel h3") == ["DocMath", "Frames", "LB-MQA", "LB-V2", "Avg", "mine"]
    assert min(plots) > 10
    legend = "#evaluation .panel:nth-child(1) .legend"
    scores = json.loads((evaluated.parent / "a" / "scores.json").read_text())["columns"]["DocMath"]["score"]
    assert texts(browser, f"{legend} .value")[0] == f"{100 * scores['pass@1']['mean']:.1f}%"
    assert texts(browser, f"{legend} .at") == ["pass@1"]
    plot = browser.find_element(By.CSS_SELECTOR, "#evaluation .u-over")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", plot)
    mouse = ActionChains(browser)
    mouse.move_to_element_with_offset(plot, plot.size["width"] // 2 - 12, 0).perform()  # over the last k
    WebDriverWait(browser, 60).until(lambda b: texts(b, f"{legend} .at") == ["pass@8"])
    assert texts(browser, f"{legend} .value")[0] == f"{100 * scores['pass@8']['mean']:.1f}%"
    assert texts(browser, f"{legend} .value")[2] == "–"
    picture = "return document.querySelector('#evaluation .panel:nth-child(2) canvas').toDataURL()"
    whole = browser.execute_script(picture)
    click(browser, f"{legend} button")  # hides this evaluation in all plots
    assert browser.execute_script(picture) != whole
    pressed = "[...document.querySelectorAll('#evaluation .legend button')].map((e) => e.getAttribute('aria-pressed'))"
    assert browser.execute_script(f"return {pressed}").count("false") == 5


@pytest.mark.parametrize("width", [360, 1280])
def test_evaluations_in_the_dark_and_alone(show, evaluated, width):
    browser = show(evaluated, width=width, scheme="dark")
    dark = inks(browser)
    assert luminance(browser, "#evaluation .panel") < 0.2 and min(dark) > 10
    picture = "return document.querySelector('#evaluation canvas').toDataURL()"
    before = browser.execute_script(picture)
    choose(browser, "#theme", "light")
    assert browser.execute_script(picture) != before
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser = show(evaluated.with_name("alone.html"), width=width)
    assert texts(browser, "nav a") == ["Evaluation"] and len(inks(browser)) == 5 and min(inks(browser)) > 10
    assert not browser.find_element(By.ID, "window").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_run_of_a_thousand_steps_opens_soon(show, tmp_path):
    """`pytest -s` prints how soon; the goal is three seconds."""
    run = make_run(tmp_path / "thousand", 1000)
    write_report([run], tmp_path / "report.html")
    started = time.monotonic()
    browser = show(tmp_path / "report.html")
    seconds = time.monotonic() - started
    size = (tmp_path / "report.html").stat().st_size
    print(f"\n1,000 steps: {size / 1e6:.1f} MB, open and complete after {seconds:.2f} s")
    drawn = inks(browser)
    assert len(drawn) > 25 and min(drawn) > 10
    assert "averaged over 20 steps" in texts(browser, "#comparison caption")[0]
