"""What a sweep shows at its end: a ranking on the terminal, a plot of the objective against the swept keys, a page."""

import shlex
import sys

from llmkit import rundir
from llmkit.launchers.sweep import Sweep, swept_values

MOST_TICKS = 10  # values of a key that are each named on its axis; of more, which a search draws, the names overlap


def print_ranking(sweep: Sweep) -> None:
    """The jobs from the best to the worst, then those without a result and why."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    jobs = sweep.jobs_of_this_command
    values = {id(job): shown for job, shown in zip(jobs, _with_alpha(sweep), strict=True)}
    keys = list(dict.fromkeys(key for shown in values.values() for key in shown))
    table = Table(title=Text(f"{sweep.directory}: ranked by {sweep.objective}"), title_justify="left")
    for heading in ["#", *keys, sweep.objective, "job"]:
        table.add_column(Text(heading), overflow="fold")
    for rank, job in enumerate(sweep.ranked(), start=1):
        shown = values[id(job)]
        row = [str(rank), *(shown.get(key, "") for key in keys), f"{job.objective:.4g}", job.run_dir.name]
        table.add_row(*map(Text, row))  # a value may have brackets, which are no markup
    console = Console()
    if sweep.ranked():
        console.print(table)
    for job in jobs:
        if job.status != "completed":
            reason = f": {job.error.splitlines()[0]}" if job.error else ""
            console.print(f"{job.status}: {job.run_dir}{reason}", highlight=False, markup=False, soft_wrap=True)
    if {job.status for job in jobs if not job.is_over} & {"waiting", "preempted", "stopped"}:
        console.print("The same command goes on.")
    if best := next(iter(sweep.ranked()), None):
        console.print(f"best: {best.run_dir / 'final'}", highlight=False, markup=False, soft_wrap=True)
        serve = shlex.join(["llmkit", "serve", f"sweep={sweep.directory}"])
        console.print(f"serve: {serve}", highlight=False, markup=False, soft_wrap=True)


def _with_alpha(sweep: Sweep) -> list[dict[str, str]]:
    """The swept values, with lora_alpha beside a swept r: what the update is scaled by should be seen."""
    shown = swept_values([job.overrides for job in sweep.jobs_of_this_command])
    for job, values in zip(sweep.jobs_of_this_command, shown, strict=True):
        if "r" in values and "lora_alpha" not in values and job.config.lora is not None:
            values["lora_alpha"] = str(job.config.lora.lora_alpha)
    return shown


def plot(sweep: Sweep) -> None:
    """`sweep.png`: one panel per swept key, the objective against its values."""
    jobs = sweep.ranked()
    if len(jobs) < 2:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    values = swept_values([job.overrides for job in jobs])
    keys = list(dict.fromkeys(key for shown in values for key in shown))
    figure, panels = plt.subplots(1, len(keys), figsize=(4 * len(keys) + 1, 3.5), squeeze=False, layout="constrained")
    for key, panel in zip(keys, panels[0], strict=True):
        points = [(shown[key], job.objective) for shown, job in zip(values, jobs, strict=True) if key in shown]
        try:
            numbers = [float(value) for value, _ in points]
        except ValueError:
            points.sort()
            panel.plot([value for value, _ in points], [y for _, y in points], "o")
        else:
            ordered = sorted(zip(numbers, [y for _, y in points], strict=True))
            panel.plot([x for x, _ in ordered], [y for _, y in ordered], "o-" if len(keys) == 1 else "o")
            if min(numbers) > 0 and max(numbers) / min(numbers) >= 4:
                panel.set_xscale("log")
            if len(set(numbers)) <= MOST_TICKS:
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.set_xticks(sorted(set(numbers)), [f"{x:g}" for x in sorted(set(numbers))])
        panel.set_xlabel(key)
        panel.set_ylabel(sweep.objective)
        panel.grid(alpha=0.3)
    figure.savefig(sweep.directory / "sweep.png", dpi=120)
    plt.close(figure)
    print(f"plot: {sweep.directory / 'sweep.png'}")


def make_report(sweep: Sweep) -> None:
    """`report.html`, the page of `llmkit report`. What goes wrong with it takes nothing from the sweep."""
    from llmkit.reporting.collection import read_report
    from llmkit.reporting.page import write_page

    page = sweep.directory / rundir.REPORT
    try:
        write_page(read_report([sweep.directory]), page)
    except Exception as error:
        again = shlex.join(["llmkit", "report", str(sweep.directory)])
        print(
            f"warning: the report was not made ({error or type(error).__name__}); {again} tries again.", file=sys.stderr
        )
    else:
        print(f"report: {page}")
