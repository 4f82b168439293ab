"""Runs one written config: `python -m llmkit.worker RUN_DIR`. A launcher starts it; it dies with its driver.

Where several processes train one model, each of them is such a worker, a rank of the group that `llmkit.node` starts.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit import failure, rundir
from llmkit.cli import print_error
from llmkit.config import TrainConfig, load
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, ConfigError, LlmkitError
from llmkit.failure import Failure
from llmkit.hangup import keep_output
from llmkit.processes import die_with_parent, end, stop_with_driver
from llmkit.remote import reach_with
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.checkpoints.mirror import publish
from llmkit.training.checkpoints.remote import RemoteRun, run_place
from llmkit.training.stopping import SIGNALS, StopRequest

# Imported with TRL and PEFT wherever they are installed. With mistral_common, Transformers 5.19 takes another
# tokenizer, with another template, for models that have a tekken.json: what is trained must not depend on whether
# vLLM, which brings it, is installed.
OPTIONAL_LIBRARIES = frozenset({"bitsandbytes", "wandb", "deepspeed", "mlflow", "mistral_common", "vllm", "ray"})

IMPORTED_LATE = ("matplotlib.pyplot",)  # by a run when it comes to it


def main(argv: list[str] | None = None) -> int:
    """Run the recipe in the given directory; returns the exit code of the contract."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print("usage: python -m llmkit.worker RUN_DIR", file=sys.stderr)
        return ConfigError.exit_code
    run_dir = Path(argv[0])
    if "LLMKIT_RANKS" in os.environ:
        return _run_rank(run_dir)
    try:
        stop_with_driver()
        lock = rundir.inherited_lock() or rundir.lock(run_dir)
        config = load(run_dir)
    except LlmkitError as error:
        print_error(error)
        return error.exit_code
    with lock:
        keep_output(run_dir / rundir.CONSOLE)
        stop = StopRequest().watch()
        try:
            settle_in(config)
        except Exception as error:
            return end_in_failure(Failure.of(error, config), config, run_dir)
        code = run_to_end(config, run_dir, stop)
        return merge_if_asked(config, run_dir) if code == EXIT_DONE else code


def run_to_end(config: TrainConfig, run_dir: Path, stop: StopRequest) -> int:
    """Train, and record what came of it, whatever that is; returns the exit code."""
    try:
        result = _train(config, run_dir, stop)
    except Exception as error:
        return end_in_failure(Failure.of(error, config), config, run_dir)
    return _end(result, config, run_dir)


def _run_rank(run_dir: Path) -> int:
    """One of several processes of the run, started by `llmkit.node`, which tells of failures and holds the lock."""
    number = int(os.environ["RANK"])
    die_with_parent(os.getppid(), signal.SIGKILL)
    failure.forget(run_dir, number)
    if number:
        log = os.open(run_dir / rundir.RANKS / f"rank-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
    else:
        keep_output(run_dir / rundir.CONSOLE)
    config, stop = TrainConfig(), StopRequest().watch()
    try:
        with no_garbage_collection():
            from llmkit.training import ranks
        ranks.join(os.environ["LLMKIT_RANKS"])
        config = ranks.on_main(lambda: load(run_dir))
        settle_in(config)
        result = _train(config, run_dir, stop)
        ranks.leave()
    except Exception as error:
        why = Failure.of(error, config, rank=number)
        if why.exit_code != EXIT_PREEMPTED or number == 0:
            why.leave(run_dir)
        return why.exit_code if number == 0 or why.exit_code != EXIT_PREEMPTED else EXIT_DONE
    # The first rank alone writes the result, and ends last: torchrun kills what is left when one exits in another way.
    if number:
        return EXIT_DONE
    code = _end(result, config, run_dir)
    return merge_if_asked(config, run_dir) if code == EXIT_DONE else code


def settle_in(config: TrainConfig) -> None:
    """What has to be so before the libraries that train are imported."""
    reach_with(config.storage)
    os.environ.update(config.hardware.env)
    hide_unused_libraries(config)
    _quiet_libraries()
    if config.deepspeed.stage:
        # It would ask for a GPU first and warn; and Accelerate warns of a number that is DeepSpeed's to know.
        if os.environ.get("LLMKIT_RANKS") == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)


def warm_up(configs: Sequence[TrainConfig]) -> None:
    """Import what workers on these configs will import, which have the same `hardware.env`; load and touch nothing.

    A process that is forked after this has only its own work left to do.
    """
    os.environ.update(configs[0].hardware.env)
    hide_unused_libraries(*configs)
    _quiet_libraries()
    with no_garbage_collection():
        for name in (*sorted({f"llmkit.recipes.{config.recipe}" for config in configs}), *IMPORTED_LATE):
            importlib.import_module(name)


def _train(config: TrainConfig, run_dir: Path, stop: StopRequest) -> dict[str, Any]:
    name = f"llmkit.recipes.{config.recipe}"
    # Of several runs in a process only the first imports; what the others have left is to be collected.
    with contextlib.nullcontext() if name in sys.modules else no_garbage_collection():
        from llmkit.training.console import RunConsole

        recipe = importlib.import_module(name)
    return recipe.run(config, run_dir, RunConsole(), stop)


def end_in_failure(why: Failure, config: TrainConfig, run_dir: Path) -> int:
    """Record and tell why a run has failed, and bring its copy elsewhere up to date; returns the exit code."""
    why.record(config, run_dir)
    why.tell()
    return _publish(config, run_dir, why.exit_code) if latest(run_dir) else why.exit_code


def _end(result: dict[str, Any], config: TrainConfig, run_dir: Path) -> int:
    """Record the result, and do what is left to do with it; returns the exit code."""
    rundir.write_result(run_dir, **result)
    done_with = result["status"] == "completed" and config.training.save_steps is None
    code = EXIT_DONE if rundir.is_over(result) else EXIT_PREEMPTED
    code = _publish(config, run_dir, code, done_with_checkpoints=done_with)
    if done_with:
        shutil.rmtree(run_dir / rundir.CHECKPOINTS, ignore_errors=True)
    return code


def merge_if_asked(config: TrainConfig, run_dir: Path) -> int:
    """What export.merge=true asks for. A run that is completed stays so whatever comes of it; the exit code tells."""
    if not is_to_be_merged(config, run_dir):
        return EXIT_DONE
    interrupt_at_once()
    try:
        return merge_run(config, run_dir)
    except KeyboardInterrupt:
        print("error: the merge was stopped.", file=sys.stderr)
        tell_how_to_merge(run_dir)
        return EXIT_FAILED


def interrupt_at_once() -> None:
    """From now on a request to stop raises KeyboardInterrupt: there is no next step to wait for."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)


def merge_run(config: TrainConfig, run_dir: Path) -> int:
    """Merge the adapter of a completed run, and say how it can be done later if that fails; returns the exit code."""
    from llmkit.serving.merging import merge, merged_directory
    from llmkit.serving.target import of_run

    try:
        gc.collect()  # the trainer and its model refer to each other
        target = of_run(run_dir)
        merge(
            target, merged_directory(target), config.export, say=lambda line: print(f"{'merge':<10} {line}", flush=True)
        )
    except LlmkitError as error:
        print_error(error)
    except Exception as error:
        traceback.print_exc()
        print(f"error: the merge failed: {failure.explained(error, config)}", file=sys.stderr)
    else:
        return EXIT_DONE
    tell_how_to_merge(run_dir)
    return EXIT_FAILED


def is_to_be_merged(config: TrainConfig, run_dir: Path) -> bool:
    """Whether export.merge=true asks for something here; early_stop may have ended the run without a model."""
    result = rundir.read_result(run_dir)
    completed = result is not None and result["status"] == "completed"
    return completed and config.export.merge and config.lora is not None


def tell_how_to_merge(run_dir: Path) -> None:
    """What remains to be done where a merge was asked for and was not made."""
    again = f"The run is completed; merge it later with: llmkit export run={run_dir} merge=true"
    print(again, file=sys.stderr, flush=True)


def _publish(config: TrainConfig, run_dir: Path, code: int, *, done_with_checkpoints: bool = False) -> int:
    """Bring the run's copy at checkpoint.remote up to date. A run that is over and not all there has failed in that."""
    place = run_place(config, run_dir)
    if place is None:
        return code
    remote = RemoteRun(place)
    try:
        publish(
            remote,
            run_dir,
            checkpoints=0 if done_with_checkpoints else config.checkpoint.keep,
            owned=True,
            patience=config.checkpoint.patience_s,
            tell=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
        )
        if done_with_checkpoints:
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


def hide_unused_libraries(*configs: TrainConfig) -> None:
    """Make optional libraries that no such run uses look absent, as `sys.modules[name] = None` means in Python.

    Importing TRL and PEFT imports them wherever they are installed: bitsandbytes, wandb and their own dependencies cost
    over a second of every start (trl 1.16, peft 0.21).
    """
    for name in OPTIONAL_LIBRARIES.difference(*map(used_libraries, configs)):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def used_libraries(config: TrainConfig) -> set[str]:
    """Those of OPTIONAL_LIBRARIES that a run of this config uses."""
    training, tracking = config.training, config.tracking
    used = {
        "bitsandbytes": config.qlora is not None or any(word in training.optim for word in ("8bit", "bnb", "paged")),
        "wandb": tracking.name == "wandb" or "wandb" in tracking.report_to,
        "deepspeed": config.deepspeed.stage > 0,
        "mlflow": "mlflow" in tracking.report_to,
    }
    return {name for name, needed in used.items() if needed}


def _quiet_libraries() -> None:
    """Telemetry off (TRL, the hub and W&B send it by default), and notes that are not for users off the terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for name in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    end(main())
