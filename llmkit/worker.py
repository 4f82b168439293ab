"""Runs one written config: `python -m llmkit.worker RUN_DIR`. A launcher starts it; it dies with its driver.

No argv is re-executed and nothing is composed here: what runs is what `RUN_DIR/config.yaml` says.
"""

import atexit
import contextlib
import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.cli import print_error
from llmkit.config import TrainConfig, load
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, ConfigError, LlmkitError, Stopped
from llmkit.hangup import keep_output
from llmkit.processes import die_with_parent
from llmkit.remote import reach_with
from llmkit.training.advice import is_out_of_memory, reason, untried_changes
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.checkpoints.mirror import publish
from llmkit.training.checkpoints.remote import RemoteRun, run_place
from llmkit.training.stopping import SIGNALS, StopRequest
from llmkit.training.versions import versions


def main(argv: list[str] | None = None) -> int:
    """Run the recipe in the given directory; returns the exit code of the contract."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print("usage: python -m llmkit.worker RUN_DIR", file=sys.stderr)
        return ConfigError.exit_code
    run_dir = Path(argv[0])
    try:
        _die_with_driver()
        lock = _lock(run_dir)
        config = load(run_dir)
    except LlmkitError as error:
        print_error(error)
        return error.exit_code
    reach_with(config.storage)
    with lock:
        os.environ.update(config.hardware.env)
        hide_unused_libraries(config)
        _quiet_libraries()
        keep_output(run_dir / rundir.CONSOLE)
        return _run(config, run_dir)


def _run(config: TrainConfig, run_dir: Path) -> int:
    stop = StopRequest().watch()
    try:
        with no_garbage_collection():
            from llmkit.training.console import RunConsole

            recipe = importlib.import_module(f"llmkit.recipes.{config.recipe}")
        result = recipe.run(config, run_dir, RunConsole(), stop)
    except Exception as error:
        message = _explain(error, config)
        rundir.write_result(
            run_dir,
            status="stopped" if isinstance(error, Stopped) else "failed",
            error=message,
            objective_name=config.objective,
            method=config.method.name,
            versions=versions(),
        )
        if isinstance(error, LlmkitError):
            print_error(error)
            return _publish(config, run_dir, error.exit_code) if latest(run_dir) else error.exit_code
        traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return _publish(config, run_dir, EXIT_FAILED) if latest(run_dir) else EXIT_FAILED
    rundir.write_result(run_dir, **result)
    if result["status"] != "completed":
        return _publish(config, run_dir, EXIT_PREEMPTED)
    code = _publish(config, run_dir, EXIT_DONE)
    if config.training.save_steps is None:  # those that were made have done their duty
        shutil.rmtree(run_dir / rundir.CHECKPOINTS, ignore_errors=True)
    if config.export.merge and config.lora is not None:
        code = code or _merge(config, run_dir)
    return code


def _merge(config: TrainConfig, run_dir: Path) -> int:
    """What export.merge=true asks for. The run is completed by now, whatever comes of it; the exit code tells."""
    from llmkit.serving.merging import merge, merged_directory
    from llmkit.serving.target import of_run

    for number in SIGNALS:  # there is no next step to wait for
        signal.signal(number, signal.default_int_handler)
    again = f"The run is completed; merge it later with: llmkit export run={run_dir} merge=true"
    try:
        gc.collect()  # the trainer and its model refer to each other
        target = of_run(run_dir)
        merge(
            target, merged_directory(target), config.export, say=lambda line: print(f"{'merge':<10} {line}", flush=True)
        )
    except LlmkitError as error:
        print_error(error)
    except KeyboardInterrupt:
        print("error: the merge was stopped.", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        print(f"error: the merge failed: {_explain(error, config)}", file=sys.stderr)
    else:
        return EXIT_DONE
    print(again, file=sys.stderr, flush=True)
    return EXIT_FAILED


def _publish(config: TrainConfig, run_dir: Path, code: int) -> int:
    """Bring the run's copy at checkpoint.remote up to date. A finished run that is not all there has failed in that."""
    place = run_place(config, run_dir)
    if place is None:
        return code
    finished = code == EXIT_DONE and config.training.save_steps is None
    keep, remote = config.checkpoint.keep, RemoteRun(place)
    try:
        checkpoints = 0 if finished else keep
        publish(
            remote,
            run_dir,
            checkpoints=checkpoints,
            owned=True,
            patience=config.checkpoint.patience_s,
            tell=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
        )
        if finished:
            remote.remove_checkpoints()
        elsewhere = "" if code == EXIT_DONE else f"; anywhere else: llmkit resume {place.url}"
        print(f"{'copy':<10} {place.url} is complete{elsewhere}", flush=True)
    except LlmkitError as error:
        print_error(error)
        return code or error.exit_code
    return code


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector from walking what imports make, again and again: a second of every start.

    What is there afterwards stays for good, so it is left out of later collections too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
    atexit.register(gc.unfreeze)  # else libraries in C++ report their objects as leaks at exit


def _explain(error: Exception, config: TrainConfig) -> str:
    if is_out_of_memory(error):
        changes = "".join(f"\n  {change}" for change in untried_changes(config))
        return f"out of memory: {reason(error)}.\nWhat may help, the cheapest first:{changes}"
    return str(error) or type(error).__name__


def _die_with_driver() -> None:
    """Ask the kernel to end this process when its driver dies, so that no run goes on unseen (Linux)."""
    driver = os.environ.get("LLMKIT_DRIVER")
    if driver is None or not sys.platform.startswith("linux"):
        return
    if not die_with_parent(int(driver), signal.SIGTERM):  # it died before we asked
        sys.exit(EXIT_PREEMPTED)


def _lock(run_dir: Path) -> Any:
    """The lock a launcher handed down, or our own."""
    inherited = os.environ.pop("LLMKIT_LOCK_FD", None)
    return os.fdopen(int(inherited), "a") if inherited else rundir.lock(run_dir)


def hide_unused_libraries(config: TrainConfig) -> None:
    """Make optional libraries that this run does not use look absent, as `sys.modules[name] = None` means in Python.

    Importing TRL and PEFT imports them wherever they are installed: bitsandbytes, wandb and their own dependencies cost
    over a second of every start (trl 1.16, peft 0.21).
    """
    training, tracking = config.training, config.tracking
    used = {
        "bitsandbytes": config.qlora is not None or any(word in training.optim for word in ("8bit", "bnb", "paged")),
        "wandb": tracking.name == "wandb" or "wandb" in tracking.report_to,
        "deepspeed": config.deepspeed.stage > 0,
        "mlflow": "mlflow" in tracking.report_to,
        # With it, Transformers 5.19 takes another tokenizer, with another template, for models that have a tekken.json:
        # what is trained must not depend on whether vLLM, which brings it, is installed.
        "mistral_common": False,
        "vllm": False,
        "ray": False,
    }
    for name, needed in used.items():
        if not needed:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _quiet_libraries() -> None:
    """Telemetry off (TRL, the hub and W&B send it by default), and notes that are not for users off the terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for name in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    sys.exit(main())
