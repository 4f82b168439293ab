"""Fine-tune a language model as a composed config says: `llmkit train [FILE.yaml] [KEY=VALUE ...] [-m]`.

The driver: compose, check, write the config, start the worker. It never imports torch.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from llmkit import __version__
from llmkit.cli import guarded
from llmkit.config import resolve, validate, warnings
from llmkit.config.arguments import parse_arguments
from llmkit.config.compose import groups_in_words, run_composed
from llmkit.config.resolve import use_absolute_paths
from llmkit.errors import EXIT_DONE
from llmkit.launchers.start import HYDRA_PLUGINS, SweepLauncher, start_run
from llmkit.rundir import default_run_dir

HELP = """\
llmkit train [FILE.yaml] [KEY=VALUE ...] [-m]

Fine-tunes a language model as the composed config says; the result is in a run directory under runs/.

Groups: GROUP=OPTION picks one, GROUP.KEY=VALUE sets a value (--cfg job shows them all).
{groups}

Examples:
  llmkit train                                              the demo: a minute, no GPU, no network
  llmkit train data.path=chats.jsonl model=qwen3_0_6b       your own file
  llmkit train method=lora model=mistral7b -m lora.r=4,8,16 a sweep, ranked at the end
  llmkit train sweeper=random sweeper.n=20 'training.learning_rate=tag(log,interval(1e-5,1e-3))'
                                                            a sweep of values that are drawn
  llmkit train my.yaml name=alpha training.max_steps=500    your own config file first, then changes
  llmkit train runs/alpha/config.yaml                       repeat a run

Switches: -m sweep over comma-separated values; --cfg job print the config and stop; --help"""


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_train, argv)


def _train(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if {"-h", "--help"} & set(arguments.switches):
        print(HELP.format(groups=groups_in_words()))
        return EXIT_DONE
    if "--version" in arguments.switches:
        print(__version__)
        return EXIT_DONE
    composed: list[DictConfig] = []
    SweepLauncher.sweep = None  # of an earlier call in this process
    run_composed("train", composed.append, arguments, HYDRA_PLUGINS)
    if SweepLauncher.sweep is not None:
        return SweepLauncher.sweep.exit_code()
    return max((_run(config) for config in composed), default=EXIT_DONE)


def _run(composed: DictConfig) -> int:
    config = resolve(composed)
    validate(config)
    use_absolute_paths(config)
    drawn = composed.sweeper.name == "random"
    ignored = ["sweeper=random has no effect on a single run; add -m."] if drawn else []
    for warning in warnings(config) + ignored:
        print(f"warning: {warning}", file=sys.stderr)
    return start_run(config, Path(config.run_dir or default_run_dir(config.name)))


if __name__ == "__main__":
    sys.exit(main())
