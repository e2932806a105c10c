"""What the page's script does, in a real browser: the banner, axes, numbers to save, from a plot to transcripts."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import pytest
from simulated_run import make_run

from spell_megatron.report.report import write_report

pytest.importorskip("selenium.webdriver", reason="needs the package selenium (extra dev)")

from chromium_page import choose, click, inks, luminance, texts
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

STEPS = 12
SCRIPTS = Path(__file__).parents[2] / "spell_megatron" / "report" / "page"
REWARD = "#results .panel:nth-child(3)"
"""The panel of mean rewards, whose curves are the roles."""


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewrite(run: Path, change) -> Path:
    """Changes the records of a run: `change` gets each of them."""
    lines = []
    for record in records(run):
        change(record)
        lines.append(json.dumps(record) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", STEPS)
    (folder / "versions.json").write_text('{"spell_megatron": "9.9", "torch": "<i>2.13</i>"}')
    (folder / "status.json").write_text(json.dumps({"state": "finished", "steps": STEPS, "time": 0}))
    return folder


@pytest.fixture(scope="module")
def page(run) -> Path:
    """Its transcripts are of the first, a middle and the last step."""
    write_report([run], run.parent / "report.html", transcripts=15)
    return run.parent / "report.html"


@pytest.fixture(scope="module")
def several(run, tmp_path_factory) -> Path:
    """Three runs; the last had other held-out questions, a hostile name, and trained nothing in spite of its steps."""
    folder = tmp_path_factory.mktemp("several")
    short = make_run(folder / "short", 6, seed=1, dump="none")
    name = "=cmd()<b>"
    other = shutil.copytree(run, folder / name)

    def spoil(record: dict) -> None:
        if record["step"]:
            record |= {"train/skipped": 1.0, "train/grad_norm": None}
        if "validation/pass@1" in record:
            record |= {"validation/pass@1": 0.369, "validation/question_set": 43, "validation/questions": 9}

    rewrite(other, spoil)
    message = "<script>alert(1)</script> [Errno 28] No space left on device"
    (other / "status.json").write_text(json.dumps({"state": "failed", "steps": STEPS, "time": 0, "message": message}))
    write_report([run, short, other], folder / "report.html")
    return folder / "report.html"


def focus(browser, selector: str):
    plot = browser.find_element(By.CSS_SELECTOR, f"{selector} .plot")
    browser.execute_script("arguments[0].focus()", plot)
    return plot


def saved(browser, selector: str, folder: Path) -> list[dict[str, str]]:
    """The rows of the file that a button saves."""
    where = {"behavior": "allow", "downloadPath": str(folder)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    click(browser, selector)
    WebDriverWait(browser, 60).until(lambda _: list(folder.glob("*.csv")))
    with next(folder.glob("*.csv")).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_first_screen_says_how_it_went(show, page, run):
    browser = show(page)
    assert texts(browser, "#banner") == []
    logged = records(run)
    first, last = (f"{100 * logged[i]['validation/pass@1']:.1f}%" for i in (0, -1))
    headline = f"{first} → {last} ± 1.8% of the answers to 500 held-out questions are right"
    assert texts(browser, "#overview .headline") == [headline]
    assert texts(browser, "#overview .health") == ["✔ No fault found."]
    facts = dict(zip(texts(browser, ".card dt"), texts(browser, ".card dd"), strict=True))
    assert facts["steps"] == "12 of 12, finished" and facts["updates"] == "12 made"
    seconds = sum(record.get("time/step", 0) + record.get("time/validation", 0) for record in logged)
    assert facts["time at work"] == f"{round(seconds / 60)} min"
    settings = dict(zip(texts(browser, "#settings tbody th"), texts(browser, "#settings tbody td"), strict=True))
    assert settings["selfplay.group_size"] == "4" and settings["run.seed"] == "0" and len(settings) > 80
    assert texts(browser, "#versions tbody tr") == ["spell_megatron9.9", "torch<i>2.13</i>"]
    assert not browser.find_element(By.ID, "settings").is_displayed()


def test_the_banner_says_what_went_wrong_and_what_to_do(show, several):
    browser = show(several)
    assert texts(browser, "#banner h3") == ["=cmd()<b>"]
    assert texts(browser, "#banner li strong") == ["✖ The run failed. ", "✖ The policy was not trained. "]
    assert "<script>alert(1)</script> [Errno 28]" in texts(browser, "#banner .what")[0]
    assert texts(browser, "#banner .remedy")[0].startswith("What to do: Free some space")
    top = browser.execute_script("return document.querySelector('#banner').getBoundingClientRect().top")
    assert top < 200
    assert texts(browser, ".card .verdict")[2] == "No update was made: the policy is the one that it started from."
    assert texts(browser, ".card:nth-child(3) dd")[1] == "0 made, 12 left out"
    assert texts(browser, "main b") == ["What to do: "] * 2


def test_the_best_of_runs_is_marked_where_they_had_the_same_questions(show, several):
    browser = show(several)
    held_out = "#comparison tbody tr:nth-child(1)"
    assert texts(browser, f"{held_out} th") == ["held-out pass@1"]
    assert texts(browser, f"{held_out} .winner") == []
    assert "cannot be compared: their questions differ" in texts(browser, "#comparison caption")[0]
    click(browser, "#overview .card:nth-child(3) button.show")  # hides the run with other questions
    assert len(texts(browser, f"{held_out} .winner")) == 2
    assert "cannot be compared" not in texts(browser, "#comparison caption")[0]
    rows = dict(zip(texts(browser, "#comparison tbody th"), range(1, 99)))
    assert texts(browser, f"#comparison tbody tr:nth-child({rows['reward of questions']}) .winner") == []
    assert len(texts(browser, f"#comparison tbody tr:nth-child({rows['seconds per step']}) .winner")) == 2


def test_plots_over_time_and_tokens(show, page, run):
    browser = show(page)
    assert texts(browser, "#axis option") == ["steps", "time at work", "tokens generated", "tokens trained on"]
    picture = "return document.querySelector('#results .panel:nth-child(3) canvas').toDataURL()"
    over_steps = browser.execute_script(picture)
    assert texts(browser, f"{REWARD} .at") == ["step 12"]
    choose(browser, "#axis", "time at work")
    assert browser.execute_script(picture) != over_steps
    seconds = sum(record.get("time/step", 0) + record.get("time/validation", 0) for record in records(run))
    assert texts(browser, f"{REWARD} .at") == [f"{round(seconds / 60)} min, step 12"]
    plot = focus(browser, REWARD)
    plot.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # the start, steps 1 and 2
    reward = records(run)[2]["selfplay/questioner/reward"]
    assert texts(browser, f"{REWARD} .at")[0].endswith(", step 2")
    assert texts(browser, f"{REWARD} .value")[0] == f"{reward:.3f}".replace("-", "−")
    assert f"questions {reward:.3f}".replace("-", "−") in plot.get_attribute("aria-valuetext")
    choose(browser, "#axis", "tokens generated")
    tokens = sum(record.get("selfplay/generated_tokens", 0) for record in records(run))
    thousands, _, place = texts(browser, f"{REWARD} .at")[0].partition("k tokens, ")
    assert float(thousands) == pytest.approx(tokens / 1000, abs=0.01) and place == "step 12"
    assert min(inks(browser)) > 10


def test_runs_over_time_have_their_own_places(show, several):
    browser = show(several)
    choose(browser, "#axis", "time at work")
    assert min(inks(browser)) > 10
    focus(browser, "#results .panel:nth-child(2)").send_keys(Keys.END)
    values = texts(browser, "#results .panel:nth-child(2) .value")
    assert len(values) == 3 and "–" in values  # the short run has ended there


def test_a_plot_is_saved_as_numbers(show, page, run, tmp_path):
    browser = show(page)
    rows = saved(browser, f"{REWARD} button.save", tmp_path)
    assert list(rows[0]) == ["run", "step", "seconds of work", "questions", "answers", "judgments"]
    logged = [record for record in records(run) if record["step"]]
    roles = {"questions": "questioner", "answers": "responder", "judgments": "verifier"}
    for row, record in zip(rows, logged, strict=True):
        assert int(row["step"]) == record["step"] and row["run"] == "run"
        for label, role in roles.items():
            assert float(row[label]) == record[f"selfplay/{role}/reward"]  # every digit


def test_numbers_of_runs_are_saved_as_they_are_drawn(show, several, run, tmp_path):
    """Averaged, without the run that is hidden; a name that a spreadsheet would compute is a text."""
    browser = show(several)
    choose(browser, "#window", "3 steps")
    click(browser, "#overview .card:nth-child(2) button.show")
    rows = saved(browser, "#results .panel:nth-child(2) button.save", tmp_path)
    assert {row["run"] for row in rows} == {"run", "'=cmd()<b>"}
    assert list(rows[0]) == ["run", "step", "seconds of work", "value", "value, mean of 3 steps"]
    scores = [record["selfplay/rule_score"] for record in records(run)[1:]]
    assert float(rows[4]["value"]) == scores[4]
    assert float(rows[4]["value, mean of 3 steps"]) == pytest.approx(sum(scores[3:6]) / 3)


def test_every_number_is_saved(show, page, run, tmp_path):
    rows = saved(show(page), "#metrics .filters button.save", tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(STEPS + 1))
    for row, record in zip(rows, records(run), strict=True):
        numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
        assert {name: float(text) for name, text in row.items() if text and name in numbers} == numbers


def count(browser) -> int:
    return int(texts(browser, ".count")[0].split(" of ")[0])


def test_from_a_point_to_the_transcripts_of_its_step(show, page):
    browser = show(page)
    plot = browser.find_element(By.CSS_SELECTOR, f"{REWARD} .u-over")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", plot)
    mouse = ActionChains(browser)
    mouse.move_to_element_with_offset(plot, plot.size["width"] // 2 - 2, 0).click().perform()  # over the last step
    assert {text.strip() for text in texts(browser, "#questions summary > .soft:first-child")} == {"step 12"}
    assert 0 < count(browser) < 15 and not browser.find_element(By.ID, "instead").is_displayed()
    assert browser.find_element(By.ID, "filter-step").get_attribute("value") == "12"


def test_from_a_point_by_keys_to_the_nearest_step_of_the_sample(show, page):
    browser = show(page)
    focus(browser, REWARD).send_keys(Keys.END, Keys.ARROW_LEFT, Keys.ENTER)  # step 11, which is not in the sample
    assert {text.strip() for text in texts(browser, "#questions summary > .soft:first-child")} == {"step 12"}
    said = browser.find_element(By.ID, "instead")
    assert said.is_displayed() and "no transcripts of step 11; here is the nearest step, 12" in said.text
    assert "rollouts/step_000011" in said.text
    choose(browser, "#filter-step", "all")
    assert not said.is_displayed() and count(browser) > 10


def test_the_run_of_the_nearest_curve_is_shown(show, several):
    browser = show(several)
    click(browser, "#overview .card:nth-child(1) button.show")  # the last run's curves lie over the first's
    focus(browser, "#results .panel:nth-child(3)").send_keys(Keys.END, Keys.ENTER)
    assert browser.find_element(By.ID, "filter-run").get_attribute("value") == "2" and count(browser) > 0


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A run whose log holds hardly anything: ratios close to 1, a constant, gaps, and a single point."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    folder.mkdir()
    ratios = 1.000044, 1.000051, 1.000049
    lines = [{"step": i + 1, "time": 1000.0 - i, "train/mismatch_max_ratio": r} for i, r in enumerate(ratios)]
    for line in lines:
        line |= {"train/lr": 1e-6, "train/importance_weight": float("nan")}
    lines[1] |= {"train/entropy": 0.25, "selfplay/rule_score": 0.0003}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([folder], folder.parent / "report.html")
    return folder.parent / "report.html"


def test_numbers_are_shown_with_the_digits_that_tell_them_apart(show, odd):
    browser = show(odd)
    panels = texts(browser, "#training h3")
    number = panels.index("Largest ratio of engine and trainer") + 1
    assert texts(browser, f"#training .panel:nth-child({number}) .value") == ["1.000049"]
    focus(browser, f"#training .panel:nth-child({number})").send_keys(Keys.HOME)
    assert texts(browser, f"#training .panel:nth-child({number}) .value") == ["1.000044"]
    number = panels.index("Learning rate") + 1
    assert texts(browser, f"#training .panel:nth-child({number}) .value") == ["1.00e−6"]
    assert texts(browser, "#results .panel .value") == ["0.030%"]
    assert "Invalid" not in texts(browser, "#overview")[0] and "was set back" in texts(browser, "#overview .card")[0]
    assert min(inks(browser)) > 3


@pytest.mark.parametrize(
    ("unit", "low", "high", "ends"),
    [
        ("number", 1.000044, 1.000051, [0.995, 1.005]),  # looks constant
        ("number", 1e-6, 1e-6, [0.995e-6, 1.005e-6]),
        ("number", 0.0, 0.0, [0.0, 0.5]),
        ("number", -2.0, 2.0, [-2.32, 2.32]),
        ("share", 1.0, 1.0, [0.975, 1.0]),
        ("share", 0.369, 0.369, [0.344, 0.394]),
        ("share", 0.2, 0.7, [0.16, 0.74]),
        ("share", 0.0, 0.0, [0.0, 0.025]),
        ("share", 0.0003, 0.0003, [0.000225, 0.000375]),
    ],
)
def test_what_hardly_changes_looks_so(show, page, unit, low, high, ends):
    script = "\n".join((SCRIPTS / name).read_text() for name in ("numbers.js", "axes.js"))
    found = show(page).execute_script(f"{script}\nreturn valueRange(...arguments)", unit, False, low, high, 0)
    assert found == pytest.approx(ends, rel=1e-3, abs=1e-9)


def test_on_paper_the_page_is_light(show, page):
    browser = show(page, scheme="dark")
    assert luminance(browser) < 0.2
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert luminance(browser) > 0.9 and min(inks(browser)) > 10
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert luminance(browser) < 0.2


def test_many_runs_differ_in_colour_or_in_dashes(show, run, tmp_path):
    runs = [shutil.copytree(run, tmp_path / f"run-{i}") for i in range(20)]
    write_report(runs, tmp_path / "report.html", transcripts=1)
    browser = show(tmp_path / "report.html", width=768)
    strokes = "return [...document.querySelectorAll('#overview .card .stroke')].map((e) => e.style.background)"
    drawn = browser.execute_script(strokes)
    assert len(drawn) == 20 == len(set(drawn))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 768


@pytest.mark.slow
def test_a_run_of_ten_thousand_steps_opens_soon(show, run, tmp_path):
    """`pytest -s` prints how soon."""
    folder = shutil.copytree(run, tmp_path / "long")
    logged = records(run)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10_001):
            record = dict(logged[0] if not step else logged[1 + (step - 1) % STEPS])
            changed = {k: v * (1 + step % 997 / 1e4) for k, v in record.items() if isinstance(v, float)}
            file.write(json.dumps(record | changed | {"step": step, "time": 1e9 + step}) + "\n")
    started = time.monotonic()
    write_report([folder], tmp_path / "report.html")
    written = time.monotonic()
    browser = show(tmp_path / "report.html")
    size = (tmp_path / "report.html").stat().st_size
    print(
        f"\n10,000 steps: {size / 1e6:.1f} MB, written in {written - started:.1f} s, open and complete after "
        f"{time.monotonic() - written:.1f} s"
    )
    started = time.monotonic()
    choose(browser, "#axis", "time at work")
    print(f"another axis after {time.monotonic() - started:.1f} s")
    assert min(inks(browser)) > 10
