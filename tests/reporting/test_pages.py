"""The page of a report: whole, self-contained, with real tables, and with nothing of a user's words taken for HTML."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import plotly.graph_objects as go
import pytest
from run_files import lora_config, losses, write_sweep

from llmkit import rundir
from llmkit.errors import ConfigError
from llmkit.reporting.charts import colour, loss_chart, objective_charts, training_charts
from llmkit.reporting.collection import Report, read_report
from llmkit.reporting.page import html, write_page
from llmkit.reporting.tables import answers_table, audits, config_table, costs, leaderboard

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


class Parsed(HTMLParser):
    """The elements of a page and its texts outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.words += "" if self._inside in ("script", "style") else data


def figures_of(report: Report) -> list[dict[str, Any]]:
    losses = loss_chart(report)
    charts = [*([losses] if losses else []), *objective_charts(report), *training_charts(report)]
    return [chart.figure for chart in charts]


def texts(table: Any) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_the_page_of_a_sweep_has_all_its_sections(ranks):
    page = Parsed((ranks / rundir.REPORT).read_text())

    anchors = {attributes["id"] for tag, attributes in page.elements if tag == "section"}
    expected = {"summary", "leaderboard", "curves", "objective", "training", "answers", "data", "cost", "config"}
    assert anchors == expected | {"commands"}
    links = {str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a" and "#" in str(attributes)}
    assert links == anchors - {"summary"}
    assert "chosen by eval_loss on the evaluation rows, out of 4 runs" in page.words
    assert "On data.test, which chose nothing: loss " in page.words


def test_nothing_of_the_page_is_fetched(ranks):
    page = Parsed((ranks / rundir.REPORT).read_text())

    assert not [attributes for tag, attributes in page.elements if tag != "a" and "src" in attributes]
    assert [attributes["href"] for tag, attributes in page.elements if tag == "link"] == ["data:,"]
    (policy,) = [attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes]
    assert str(policy).startswith("default-src 'none'; script-src 'nonce-")


def test_runs_are_linked_from_where_the_page_lies(ranks, tmp_path):
    report = read_report([ranks])
    for page in (ranks / rundir.REPORT, tmp_path / "elsewhere" / "page.html"):
        links = [row[1].link for row in leaderboard(report, page).rows]
        assert [(page.parent.resolve() / unquote(link)).resolve() for link in links] == [
            run.directory.resolve() for run in report.runs
        ]
        assert not any(link.startswith("/") for link in links)


def test_the_leaderboard_shows_every_figure_beside_the_swept_values(ranks):
    table = leaderboard(read_report([ranks]), ranks / rundir.REPORT)

    assert table.strong == 0
    first = dict(zip(table.heading, table.rows[0], strict=True))
    assert list(first)[:6] == ["#", "run", "status", "r", "learning_rate", "eval_loss"]
    result = rundir.read_result(ranks / first["run"].text)
    assert result is not None
    assert first["eval_loss"].text == f"{result['eval_loss']:.4f}"
    low, high = result["eval_loss_interval"]
    assert low < result["eval_loss"] < high
    assert first["eval_loss"].notes == [f"{low:.4f} to {high:.4f}", f"before {result['base']['eval_loss']:.4f}"]
    assert re.fullmatch(r"\d+\.\d% to \d+\.\d%", first["exact_match (16 rows)"].notes[0])
    assert first["loss on data.test (36 rows)"].text == f"{result['test']['loss']['value']:.4f}"
    assert first["alpha / r"].text in ("4 / 2 = 2", "8 / 4 = 2")
    assert first["seed"].text == "42"


def test_cost_is_added_up(ranks):
    report = read_report([ranks])
    table = costs(report)

    tokens = sum(run.cost.tokens or 0 for run in report.runs if run.cost)
    totals = dict(zip(table.heading, texts(table)[-1], strict=True))
    assert totals["run"] == "all"
    assert totals["tokens"] == f"{tokens:,}"
    assert totals["money"] == f"{sum(run.cost.money or 0 for run in report.runs if run.cost):,.4f}"


def test_only_what_differs_of_the_configs_is_shown(ranks):
    assert texts(config_table(read_report([ranks])))[0][0] == "lora.lora_alpha"
    assert [row[0] for row in texts(config_table(read_report([ranks])))] == [
        "lora.lora_alpha",
        "lora.r",
        "training.learning_rate",
    ]


def test_answers_of_the_base_stand_beside_those_of_the_best(ranks):
    report = read_report([ranks])
    table = answers_table(report)

    assert table is not None
    assert table.heading[:3] == ["prompt", "expected", "base model"]
    assert [heading.endswith("(step 6)") for heading in table.heading[3:]] == [True] * 3
    best = report.runs[0]
    assert best.shown_answers is not None
    assert [row[2] for row in texts(table)] == [sample.answer for sample in best.answers[0].samples]
    assert [row[3] for row in texts(table)] == [sample.answer for sample in best.shown_answers.samples]


def test_bases_that_answer_differently_have_a_column_each(make_run):
    def samples(base: str) -> list[dict[str, Any]]:
        return [{"step": step, "prompt": "p", "expected": "e", "answer": f"{base}{step}"} for step in (0, 2)]

    places = [
        make_run(name, config=lora_config(seed=seed), samples=samples(name), status="completed", objective=seed)
        for seed, name in enumerate("ab")
    ]
    table = answers_table(read_report(places))

    assert table is not None
    assert table.heading[2:] == ["base of seed=0", "base of seed=1", "seed=0 (step 2)", "seed=1 (step 2)"]
    assert texts(table) == [["p", "e", "a0", "b0", "a2", "b2"]]


def test_an_audit_that_runs_share_is_shown_once_and_others_beside_it(ranks, make_run):
    report = read_report([ranks])
    assert [len(one.runs) for one in audits(report)] == [4]

    other = make_run("other", records=losses(1.0))
    audit = rundir.read_json(next(ranks.glob("*/data_audit.json")))
    assert audit is not None
    rundir.write_json(other / rundir.DATA_AUDIT, audit | {"warnings": ["7 rows repeat another one."]})
    assert [(len(one.runs), one.warnings) for one in audits(read_report([ranks, other]))] == [
        (4, []),
        (1, ["7 rows repeat another one."]),
    ]


def test_the_charts_are_ones_that_plotly_knows(ranks):
    figures = figures_of(read_report([ranks]))

    assert len(figures) == 5  # losses, two swept keys, learning rate, gradient norm
    for figure in figures:
        go.Figure(figure)  # raises ValueError for a property that is none


def test_a_run_has_one_colour_in_all_charts(ranks):
    report = read_report([ranks])

    for figure in figures_of(report):
        for trace in figure["data"]:
            if "meta" in trace:
                own = colour(report.runs[trace["meta"]["run"]], report.runs)
                assert trace["marker"]["color"] == own


def objective_axes(make_run, tmp_path: Path, values: list[str]) -> list[dict[str, Any]]:
    for number, _ in enumerate(values):
        make_run(f"s/{number}", status="completed", eval_loss=1.0 + number, objective=1.0 + number)
    jobs = [{"run_dir": f"s/{number}", "overrides": [f"x.key='{value}'"]} for number, value in enumerate(values)]
    report = read_report([write_sweep(tmp_path / "s", *jobs)])
    return [chart.figure["layout"]["xaxis"] for chart in objective_charts(report)]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1e-4", "3e-4", "1e-3"], "log"),
        (["4", "8", "16"], "linear"),
        (["0", "10", "100"], "linear"),  # a logarithm of 0 there is none
        (["-1", "1", "100"], "linear"),
    ],
    ids=str,
)
def test_an_axis_is_logarithmic_where_its_values_span_ten_times_and_more(make_run, tmp_path, values, kind):
    (axis,) = objective_axes(make_run, tmp_path, values)

    assert axis["type"] == kind


def test_words_are_categories_that_keep_apart_though_their_ends_are_alike(make_run, tmp_path):
    long = "a" * 60
    (axis,) = objective_axes(make_run, tmp_path, [f"x/{long}", f"y/{long}", "z"])

    assert axis["tickvals"] == [0, 1, 2]
    assert axis["ticktext"][2] == "z"


def test_a_key_that_all_runs_share_has_no_chart(make_run, tmp_path):
    assert objective_axes(make_run, tmp_path, ["1", "1"]) == []


def test_what_users_and_models_wrote_is_text_and_nothing_else(make_run, tmp_path):
    sample = {"prompt": EVIL, "expected": "\ud800 half", "answer": f"{EVIL}\x00 {{{{ 7 * 7 }}}}"}
    for number in (1, 2):
        make_run(
            f"s/{number}",
            config=lora_config(run_dir=EVIL),
            records=losses(3.0, 2.0),
            samples=[],
            status="completed",
            eval_loss=float(number),
            objective=float(number),
            error=EVIL,
        )
        lines = [json.dumps({"step": step} | sample) for step in (0, 2)]
        (tmp_path / "s" / str(number) / rundir.SAMPLES).write_text("\n".join(lines))
    jobs = [{"run_dir": f"s/{number}", "overrides": [f'model.name="{EVIL}{number}"']} for number in (1, 2)]
    page = write_sweep(tmp_path / "s", *jobs) / rundir.REPORT

    write_page(read_report([page.parent]), page)

    parsed = Parsed(page.read_text())
    scripts = [attributes for tag, attributes in parsed.elements if tag == "script"]
    assert len(scripts) == 3
    assert all(attributes.get("nonce") for attributes in scripts)
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert EVIL in parsed.words
    assert "{{ 7 * 7 }}" in parsed.words
    figures = re.search(r'id="figures">(.*?)</script>', page.read_text(), re.S)
    assert figures
    drawn = json.loads(figures[1])
    assert not [
        tick for tick in drawn["objective-0"]["layout"]["xaxis"]["ticktext"] if "<" in tick
    ]  # HTML to plotly.js
    assert not [trace["text"] for trace in drawn["losses"]["data"] if "<" in trace["text"]]


def test_a_loss_that_is_no_number_does_not_spoil_the_page(make_run):
    run_dir = make_run("run", records=losses(3.0, math.nan), status="failed", error="step 2: the loss is nan.")

    page = html(read_report([run_dir]), run_dir / rundir.REPORT)

    figures = re.search(r'id="figures">(.*?)</script>', page, re.S)
    assert figures
    assert json.loads(figures[1], parse_constant=pytest.fail)["losses"]["data"][0]["y"] == [3.0, None]


def test_a_run_that_failed_at_once_has_a_page_without_charts(make_run):
    run_dir = make_run("run", status="failed", error="there is no such model")

    page = Parsed(html(read_report([run_dir]), run_dir / rundir.REPORT))

    assert "there is no such model" in page.words
    assert "script" not in {tag for tag, _ in page.elements}


def test_long_curves_make_a_small_page_that_says_so(make_run):
    run_dir = make_run("run", records=losses(*(5.0 / step for step in range(1, 30_001))), status="completed")
    report = read_report([run_dir])

    page = html(report, run_dir / rundir.REPORT)

    assert "logged more than 2,000 points (up to 30,000)" in page
    assert len(json.dumps(figures_of(report))) < 300_000


def test_what_is_no_report_of_ours_is_not_overwritten(make_run, tmp_path):
    report = read_report([make_run("run", records=losses(1.0))])
    (tmp_path / "mine.html").write_text("<p>mine</p>")

    with pytest.raises(ConfigError, match=r"mine\.html: is there already and no report of llmkit"):
        write_page(report, tmp_path / "mine.html")
    write_page(report, tmp_path / "new" / "page.html")
    write_page(report, tmp_path / "new" / "page.html")

    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
