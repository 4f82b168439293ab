"""Bring a sweep's record up to date without the driver that started it: `llmkit jobs collect`."""

from pathlib import Path

from llmkit import rundir
from llmkit.launchers.overview import OPEN, Overview
from llmkit.launchers.sweep import Sweep


def collect_sweep(directory: Path) -> int:
    """Write sweep.json, the ranking, the plot and the report from what the runs have left.

    Returns the sweep's exit code. Raises ConfigError if its driver is at it.
    """
    with rundir.lock(directory):
        sweep = Sweep.reopen(directory)
        made = [job for job in sweep.jobs_of_this_command if (job.run_dir / rundir.CONFIG).exists()]
        for job, view in zip(made, Overview().look([job.run_dir for job in made]), strict=True):
            if view.state in OPEN:
                sweep.note(job, status=view.state, detail=f"job {view.job_id}")
            else:
                sweep.collect(job, ended=view.detail)
        sweep.finish()
    if left := sum(job.status in OPEN for job in sweep.jobs_of_this_command):
        print(f"left    {left} of {len(made)} runs have not ended; the same command ranks them too, later")
    return sweep.exit_code()
