"""`llmkit report`, as it is typed, and the page that every sweep leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import rundir

CHECKOUT = Path(__file__).parents[1]
FAST = ("training.max_steps=2", "evaluation=off", "training.logging_steps=1")
HEAVY = ("torch", "transformers", "datasets", "pandas", "numpy", "matplotlib")


@pytest.fixture(scope="module")
def two(run_llmkit_in, tmp_path_factory) -> Path:
    """A directory with a finished sweep, runs/two. Read only but for its page."""
    directory = tmp_path_factory.mktemp("two")
    done = run_llmkit_in(directory, "train", "-m", "lora.r=2,4", "name=two", *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "report: runs/two/report.html"
    return directory


def test_a_sweep_leaves_its_page_and_the_verb_writes_it_anew(run_llmkit, two):
    page = two / "runs" / "two" / rundir.REPORT
    made = page.stat().st_mtime_ns

    done = run_llmkit("report", "two", cwd=two)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "report: runs/two/report.html\n"
    assert page.stat().st_mtime_ns > made
    assert "sweep runs/two" in page.read_text()


def test_the_page_of_a_run_lies_in_it_and_that_of_several_here_or_where_it_should(run_llmkit, two):
    runs = ("runs/two/r=2", "runs/two/r=4")

    assert run_llmkit("report", runs[0], cwd=two).stdout == "report: runs/two/r=2/report.html\n"
    assert run_llmkit("report", *runs, cwd=two).stdout == f"report: {two / 'report.html'}\n"
    assert run_llmkit("report", *runs, "to=some/where.html", cwd=two).stdout == "report: some/where.html\n"
    for page in ("runs/two/r=2/report.html", "report.html", "some/where.html"):
        assert "</html>" in (two / page).read_text()


def test_nothing_heavy_is_imported(two):
    program = (
        "import sys\nfrom llmkit.cli import main\n"
        "assert main(['report', 'two', 'to=light.html']) == 0\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=two, env=env, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


def test_a_page_that_cannot_be_written_takes_nothing_from_the_sweep(run_llmkit, two, tmp_path):
    page = tmp_path / "runs" / "s" / rundir.REPORT
    page.parent.mkdir(parents=True)
    page.write_text("<p>mine</p>")

    done = run_llmkit("train", "-m", "lora.r=2", "name=s", *FAST)

    assert done.returncode == 0, done.stderr
    assert "warning: the report was not made (runs/s/report.html: is there already" in done.stderr
    assert "llmkit report runs/s" in done.stderr
    assert page.read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which run or sweep?"),
        (["towl"], "towl: there is no such run, sweep or directory"),
        (["twoo"], "Did you mean 'two'?"),
        (["two", "ot=x.html"], "ot=x.html: llmkit report takes runs, sweeps and to=FILE.html"),
        (["runs/two/r=5"], "Did you mean 'r="),
        (["two", "to="], "to=FILE.html: needs a file, once"),
        (["two", "to=a.html", "to=b.html"], "to=FILE.html: needs a file, once"),
        (["two", "to=runs"], "to=runs: is a directory; name a file, to=runs/report.html"),
        (["two", "to=runs/two/sweep.json"], "is there already and no report of llmkit"),
        (["runs"], "neither a run (config.yaml) nor a sweep (sweep.json)"),
        (["s3://bucket/runs/a"], "reports are made of directories"),
        (["--html", "two"], "--html: unknown switch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_explained(run_llmkit, two, words, message):
    done = run_llmkit("report", *words, cwd=two)

    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
