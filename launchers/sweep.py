"""A sweep's directory: which jobs it has, what became of each, and the ranking at the end."""

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from llmkit import rundir
from llmkit.config import TrainConfig, load, validate, warnings
from llmkit.config.resolve import use_absolute_paths
from llmkit.config.schema import FIGURES_OF_RECIPE
from llmkit.config.validate_sweep import sweep_problems, sweep_warnings
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, ConfigError, LlmkitError
from llmkit.launchers.job_record import JobRecord, record_end
from llmkit.launchers.prepare import finished_elsewhere, finished_result, send_what_is_missing

# Objectives where more is better; every other is a loss.
MAXIMIZED = {name for names in FIGURES_OF_RECIPE.values() for name in names}


@dataclass(kw_only=True)
class Job:
    """One run of a sweep. `status` is waiting, queued (on a cluster), running, or one of result.json's."""

    overrides: list[str]
    run_dir: Path
    config: TrainConfig
    status: str = "waiting"
    objective: float | None = None
    error: str | None = None
    is_over: bool = False  # completed, or ended by early_stop
    undone: str = ""  # what of a run that is over is not as it was asked for
    recorded: str | None = None  # how sweep.json names the directory, where whoever wrote it saw it elsewhere
    started: float | None = None  # on this process's clock, if it saw the start

    def record(self) -> dict[str, Any]:
        """The job as sweep.json shows it."""
        shown = {"overrides": self.overrides, "run_dir": self.recorded or str(self.run_dir), "status": self.status}
        return shown | {"objective": self.objective, "error": self.error}


@dataclass
class Sweep:
    """The jobs of this command and, from an earlier command with the same name, those that lie beside them."""

    directory: Path
    objective: str
    jobs_of_this_command: list[Job]
    earlier: list[dict[str, Any]]

    @classmethod
    def plan(
        cls,
        directory: Path,
        overrides: Sequence[Sequence[str]],
        configs: Sequence[TrainConfig],
        *,
        ready: Callable[[list[TrainConfig]], None],
        swept: Sequence[str] = (),
    ) -> "Sweep":
        """Check all jobs before any starts; a job that has finished already is kept.

        Args:
            ready: checks those that are to run once more, where they are to run.
            swept: keys that are in a job's name even where, for now, all jobs have the same value.

        Raises:
            ConfigError: with the problems of all jobs.
        """
        if (directory / rundir.CONFIG).exists():
            raise ConfigError(f"{directory} holds a single run; choose another name= for a sweep.")
        if at_odds := sweep_problems(configs):
            raise ConfigError(*at_odds)
        names = job_names(overrides, swept)
        jobs: list[Job] = []
        problems: dict[str, list[str]] = {}  # the jobs that have each
        for job_overrides, name, config in zip(overrides, names, configs, strict=True):
            config.run_dir, config.name = str(directory / name), None
            if config.checkpoint.remote:
                config.checkpoint.remote = f"{config.checkpoint.remote.rstrip('/')}/{directory.name}"
            if config.tracking.name != "none":
                config.tracking.group = config.tracking.group or directory.name
            job = Job(overrides=list(job_overrides), run_dir=directory / name, config=config)
            try:
                validate(config)
                use_absolute_paths(config)
                result = finished_result(config, job.run_dir)
                if result is None and (elsewhere := finished_elsewhere(config, job.run_dir)):
                    _, result = elsewhere
                if result:
                    job.status, job.objective, job.error = result["status"], result["objective"], result["error"]
                    job.is_over = True
            except ConfigError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(name)
            jobs.append(job)
        if problems:
            everywhere = len(jobs)
            raise ConfigError(
                *(
                    text if len(having) == everywhere else f"{text} (job {', '.join(having)})"
                    for text, having in problems.items()
                )
            )
        of_each = dict.fromkeys(text for job in jobs for text in warnings(job.config))
        for warning in [*of_each, *sweep_warnings(configs)]:
            print(f"warning: {warning}", file=sys.stderr)
        if left := [job.config for job in jobs if job.status == "waiting"]:
            ready(left)
        known = rundir.read_json(directory / rundir.SWEEP) or {"jobs": []}
        ours = {str(job.run_dir) for job in jobs}
        sweep = cls(directory, configs[0].objective, jobs, [j for j in known["jobs"] if j["run_dir"] not in ours])
        directory.mkdir(parents=True, exist_ok=True)
        sweep.write()
        waiting = sum(job.status == "waiting" for job in jobs)
        kept = f"; {len(jobs) - waiting} finished before and are kept" if waiting < len(jobs) else ""
        if behind := sum(job.status == "stopped" for job in jobs):
            kept += f" ({behind} stopped by early_stop; early_stop=none lets them go on)"
        print(f"sweep   {directory}: {waiting} job{'s' if waiting != 1 else ''} to run{kept}", flush=True)
        return sweep

    @classmethod
    def reopen(cls, directory: Path) -> "Sweep":
        """A sweep as its sweep.json says, all of its jobs; one that was never made ready has no config of its own."""
        known = rundir.read_json(directory / rundir.SWEEP)
        assert known is not None, directory
        jobs = []
        for one in known["jobs"]:
            run_dir = directory / Path(one["run_dir"]).name
            config = load(run_dir) if (run_dir / rundir.CONFIG).exists() else TrainConfig()
            shown = {key: one[key] for key in ("overrides", "status", "objective", "error")}
            is_over = rundir.is_over(rundir.read_result(run_dir))
            jobs.append(Job(run_dir=run_dir, recorded=one["run_dir"], config=config, is_over=is_over, **shown))
        return cls(directory, known["objective"], jobs, [])

    def complete_copies(self, *, is_at_work: Callable[[Path], bool]) -> None:
        """Send what the copies of runs lack that were over before this command; one that cannot be sent is told of.

        Args:
            is_at_work: whether the process of a run may not have ended yet, and may be sending itself.
        """
        for job in self.jobs_of_this_command:
            is_over = job.config.checkpoint.remote and rundir.is_over(rundir.read_result(job.run_dir))
            if not is_over or is_at_work(job.run_dir):
                continue
            try:
                send_what_is_missing(job.config, job.run_dir)
            except LlmkitError as error:
                job.undone = str(error)
                print(f"error: {job.run_dir.name}: {error}", file=sys.stderr, flush=True)
            else:
                if not _is_to_be_merged(job):
                    record_end(job.run_dir, EXIT_DONE)

    def write(self) -> None:
        """Write sweep.json as things stand."""
        jobs = [*self.earlier, *(job.record() for job in self.jobs_of_this_command)]
        rundir.write_json(self.directory / rundir.SWEEP, {"objective": self.objective, "jobs": jobs})

    def record(self, job: Job, *, status: str) -> None:
        """Note that a job has started."""
        job.status, job.started = status, time.monotonic()
        self.write()
        print(f"start   {job.run_dir.name}   (log: {job.run_dir / 'console.log'})", flush=True)

    def note(self, job: Job, *, status: str, detail: str) -> None:
        """Note that a job on a cluster is queued or runs, and where."""
        job.status = status
        if status == "running":
            job.started = time.monotonic()
        self.write()
        print(f"{status:<7} {job.run_dir.name}   {detail}", flush=True)

    def fail(self, job: Job, reason: str) -> None:
        """Note that a job could not be started."""
        job.status, job.error = "failed", reason
        self.write()
        print(f"failed  {job.run_dir.name}: {reason}", flush=True)

    def collect(self, job: Job, *, ended: str = "", log: Path | None = None) -> None:
        """Note how a job ended, from its result.json and its job.json.

        Args:
            ended: what a scheduler says of its end.
            log: where its process has said what came before the end; None: in the run's own console.log.
        """
        result = rundir.read_result(job.run_dir)
        if result is None and ended.lower().startswith("cancelled"):
            job.status, job.error = "stopped", ended
        elif result is None:
            said = f" ({ended})" if ended else ""
            job.status = "failed"
            job.error = f"its process ended without a result{said}; see {log or job.run_dir / rundir.CONSOLE}"
        else:
            job.status, job.objective, job.error = result["status"], result.get("objective"), result.get("error")
            job.is_over = rundir.is_over(result)
            job.undone = _left_undone(job)
        self.write()
        reason = "".join(f": {said.splitlines()[0]}" for said in (job.error, job.undone) if said)
        value = "" if job.objective is None else f"   {self.objective} {job.objective:.4g}"
        took = "" if job.started is None else f"   {time.monotonic() - job.started:.0f} s"
        print(f"{job.status:<7} {job.run_dir.name}{value}{took}{reason}", flush=True)

    def ranked(self) -> list[Job]:
        """Completed jobs with a finite objective, the best first."""
        completed = [job for job in self.jobs_of_this_command if job.status == "completed"]
        done = [job for job in completed if job.objective is not None and math.isfinite(job.objective)]
        return sorted(done, key=lambda job: job.objective or 0.0, reverse=self.objective in MAXIMIZED)

    def finish(self) -> None:
        """Write sweep.json for the last time, print the ranking, draw the plot and make the report."""
        from llmkit.launchers.ranking import make_report, plot, print_ranking

        self.write()
        print_ranking(self)
        plot(self)
        make_report(self)

    def exit_code(self) -> int:
        """0 if all jobs are over or go on without us; 75 if some were stopped by a signal; 1 if any failed in part."""
        statuses = {job.status for job in self.jobs_of_this_command if not job.is_over}
        if "failed" in statuses:
            return EXIT_FAILED
        if not statuses <= {"queued", "running"}:  # preempted, stopped, or never started
            return EXIT_PREEMPTED
        return EXIT_FAILED if any(job.undone for job in self.jobs_of_this_command) else EXIT_DONE


def _left_undone(job: Job) -> str:
    """What of a run that is over is not as it was asked for, where its process has told so with its exit code."""
    record = JobRecord.read(job.run_dir)
    if not job.is_over or record is None or not record.exit_code:
        return ""
    if _is_to_be_merged(job):
        return f"not merged; llmkit export run={job.run_dir} merge=true does it"
    if job.config.checkpoint.remote:
        return "its copy is not complete; the same command sends what is missing"
    return ""


def _is_to_be_merged(job: Job) -> bool:
    asked = job.status == "completed" and job.config.export.merge and job.config.lora is not None
    return asked and not (job.run_dir / rundir.MERGED).exists()


def swept_values(overrides: Sequence[Sequence[str]], swept: Sequence[str] = ()) -> list[dict[str, str]]:
    """For each job the values of the keys that differ between the jobs, and of `swept`; all keys, if there is none.

    A key is shortened to its last word where that is clear.
    """
    parser = OverridesParser.create()
    jobs = []
    for job in overrides:
        parsed = [override for override in parser.parse_overrides(list(job)) if not override.is_delete()]
        jobs.append({p.key_or_group: p.get_value_element_as_str().strip("'\"") for p in parsed})
    keys = [key for key in dict.fromkeys(key for job in jobs for key in job) if key not in ("name", "run_dir")]
    varying = [key for key in keys if key in swept or len({job.get(key) for job in jobs}) > 1] or keys
    words = [key.rpartition(".")[2] for key in varying]
    short = {key: word if words.count(word) == 1 else key for key, word in zip(varying, words, strict=True)}
    return [{short[key]: job[key] for key in varying if key in job} for job in jobs]


def job_names(overrides: Sequence[Sequence[str]], swept: Sequence[str] = ()) -> list[str]:
    """A directory name per job, from its swept values: a longer sweep of the same keys finds the jobs of a shorter."""
    names: list[str] = []
    for job, values in zip(overrides, swept_values(overrides, swept), strict=True):
        name = re.sub(r"[^\w.=+-]+", "-", "_".join(f"{key}={value}" for key, value in sorted(values.items())))
        name = name.strip("-.") or "job"
        if len(name) > 100 or name in names:
            name = f"{name[:80]}_{blake2b(','.join(sorted(job)).encode(), digest_size=4).hexdigest()}"
        names.append(name)
    return names
