"""The page in a real browser: drawn without a word on the console and without a request; a picture of each section."""

import json
from collections.abc import Iterator

import pytest
from browser import Browser, find_chromium
from run_files import losses, write_sweep

from llmkit import rundir
from llmkit.reporting.collection import read_report
from llmkit.reporting.page import write_page

SECTIONS = (
    "summary",
    "leaderboard",
    "curves",
    "objective",
    "training",
    "answers",
    "data",
    "cost",
    "config",
    "commands",
)


@pytest.fixture(scope="module")
def browser(closed_world: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    find_chromium()
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_section_is_drawn_in_silence(browser, ranks, tmp_path, scheme):
    page = browser.open(ranks / rundir.REPORT, dark=scheme == "dark")

    assert page.said == []
    assert page.requests == [(ranks / rundir.REPORT).absolute().as_uri()]
    for name in SECTIONS:
        picture = page.screenshot(tmp_path / f"{name}.png", f"#{name}")
        assert picture.stat().st_size > 2000, name
    drawn = page.run("[...document.querySelectorAll('.chart')].map(one => one.querySelectorAll('.trace').length)")
    assert drawn == [8, 5, 5, 4, 4]  # 4 runs: two curves each; points and their medians; one curve each
    assert page.run("[...document.querySelectorAll('.chart')].every(one => one.clientHeight > 200)")


def test_the_text_of_charts_has_the_colour_of_the_page(browser, ranks):
    seen = {}
    for dark in (False, True):
        page = browser.open(ranks / rundir.REPORT, dark=dark)
        ink = page.run("getComputedStyle(document.body).color")
        assert page.run("getComputedStyle(document.querySelector('#losses .xtick text')).fill") == ink
        seen[dark] = ink
    assert seen[True] != seen[False]


def test_a_run_is_hidden_in_all_charts_by_the_keyboard(browser, ranks):
    page = browser.open(ranks / rundir.REPORT)
    page.run("document.querySelector('#legend input').focus()")
    for kind in ("keyDown", "keyUp"):
        page.ask("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", text=" " if kind == "keyDown" else "")

    shown = "[...document.querySelectorAll('.chart')].map(one => one.querySelectorAll('.trace').length)"
    page.wait_for(f"JSON.stringify({shown}) === '[6,4,4,3,3]'")
    page.run("document.querySelector('#legend button[data-all=true]').click()")
    page.wait_for(f"JSON.stringify({shown}) === '[8,5,5,4,4]'")
    assert page.said == []


def test_no_button_of_a_chart_leads_anywhere(browser, ranks):
    page = browser.open(ranks / rundir.REPORT)

    titles = page.run("[...document.querySelectorAll('.modebar-btn')].map(one => one.dataset.title)")
    assert set(titles) == {"Zoom", "Pan", "Autoscale", "Reset axes", "Download plot as a PNG"}
    links = page.run("[...document.querySelectorAll('a')].map(one => one.protocol)")
    assert set(links) == {"file:"}


def test_without_scripts_the_tables_are_there_and_it_says_what_is_not(browser, ranks):
    page = browser.open(ranks / rundir.REPORT, scripts=False)

    page.ask("Emulation.setScriptExecutionDisabled", value=False)  # to look
    assert "The charts need JavaScript" in page.run("document.querySelector('noscript').innerHTML")
    assert page.run("document.querySelectorAll('#leaderboard tbody tr').length") == 4


def test_on_paper_nothing_is_cut_off(browser, ranks):
    page = browser.open(ranks / rundir.REPORT)
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    page.ask("Emulation.setEmulatedMedia", media="print")
    page.ask("Emulation.setDeviceMetricsOverride", width=950, height=700, deviceScaleFactor=1, mobile=False)

    drawn = "[...document.querySelectorAll('.chart svg.main-svg, table')]"
    cut = f"{drawn}.filter(one => one.getBoundingClientRect().right > innerWidth)"
    assert page.run(f"{cut}.map(one => one.parentElement.outerHTML.slice(0, 200))") == []
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_a_script_in_an_answer_or_in_an_override_does_not_run(browser, make_run, tmp_path):
    evil = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'><b>bold</b>"
    for number in (1, 2):
        run_dir = make_run(
            f"s/{number}", records=losses(3.0, 2.0), status="completed", eval_loss=number, objective=number
        )
        lines = [{"step": step, "prompt": evil, "answer": evil, "expected": "e"} for step in (0, 2)]
        (run_dir / rundir.SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs = [{"run_dir": f"s/{n}", "overrides": [f'model.name="{evil}{n}"']} for n in (1, 2)]
    sweep = write_sweep(tmp_path / "s", *jobs)
    write_page(read_report([sweep]), sweep / rundir.REPORT)

    page = browser.open(sweep / rundir.REPORT)

    assert page.said == []
    assert page.run("document.title") == f"llmkit: sweep {sweep}"
    assert page.run("document.querySelectorAll('img, b').length") == 0
    assert page.run("document.querySelector('#answers td').textContent") == evil
    ticks = page.run("[...document.querySelectorAll('#objective .xtick text')].map(one => one.textContent)")
    assert all("bold</b>" in tick for tick in ticks)


def test_a_page_of_a_run_under_way_is_drawn(browser, make_run):
    run_dir = make_run("going", records=[{"step": 0, "eval_loss": 7.0}, *losses(5.0)])
    page_file = run_dir / rundir.REPORT
    with rundir.lock(run_dir):
        write_page(read_report([run_dir]), page_file)

    page = browser.open(page_file)

    assert page.said == []
    assert "running" in page.run("document.querySelector('#summary').textContent")
    assert page.run("document.querySelectorAll('#legend').length") == 0  # one run needs no legend
