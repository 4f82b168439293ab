"""Take a model out of llmkit: merge it, copy its run, publish it (`llmkit export run=RUN_DIR merge=true to=PLACE`)."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import rundir
from llmkit.answering import hide_libraries
from llmkit.cli import guarded
from llmkit.config import TrainConfig, differences, load, validate
from llmkit.config.grammar import split_override
from llmkit.config.schema import ExportConfig, StorageConfig
from llmkit.errors import EXIT_DONE, ConfigError
from llmkit.remote import is_remote, reach_with
from llmkit.serving.target import RUNS, Target, best_of_sweep, find_target, newest_finished
from llmkit.words import YES_OR_NO, Words, composed, sort_words

if TYPE_CHECKING:
    from llmkit.training.checkpoints.remote import RemoteRun

HELP = """\
llmkit export [run=RUN_DIR | sweep=DIR] merge=true [merge_base=original] [to=PLACE]
llmkit export [run=RUN_DIR | sweep=DIR] to=PLACE [checkpoints=true]
llmkit export [run=RUN_DIR | sweep=DIR] to=hub://ORG/NAME [merge=true] [public=true]

Takes a model out: merged into its base, as a copy of its run, or to the Hugging Face hub. Without run= and sweep= it is
the newest finished run under runs/.

  run          a run's directory; to merge, also one of its checkpoints, an adapter's directory, or s3://...
  sweep        a sweep's directory: its best run
  merge        true: write RUN_DIR/merged/, an ordinary model in 16-bit safetensors (float32 of a float32 run) with
               tokenizer, template and generation config. It is compared with the adapter on its base (parity.json) and
               kept only if it says the same: export.max_kl, export.min_top1_agreement
  merge_base   of a QLoRA adapter: the weights it was trained on, dequantized (the default), or the original ones
  to           the directory of the copy, here or s3://bucket/path; where checkpoint.remote is set:
               <checkpoint.remote>/NAME. It gets the model (final/, or merged/ with merge=true), config, metrics and
               result, every file verified, and files.json, which lists them with size and SHA-256; what is there
               already with the same content is not sent again
  to=hub://    a model repository, private unless public=true; it gets the files of final/ or merged/ and nothing else,
               listed first. HF_TOKEN must be set in the environment
  checkpoints  true: the checkpoints too, so that another machine can go on with the run (llmkit resume PLACE)
  export.*     limits of the comparison, size of files; storage.*: how the bucket is reached; both as in llmkit train,
               where export.merge=true merges at the end of the run

Examples:
  llmkit export merge=true
  llmkit export run=runs/alpha/checkpoints/step-00000100 merge=true
  llmkit export run=runs/alpha to=s3://bucket/runs/alpha checkpoints=true
  llmkit export sweep=runs/ranks merge=true to=hub://org/name"""

KEYS = {
    "run": "RUN_DIR",
    "sweep": "DIR",
    "to": "PLACE",
    "checkpoints": YES_OR_NO,
    "merge": YES_OR_NO,
    "merge_base": "original",
    "public": YES_OR_NO,
}
NODES = ("export", "storage")
HUB = "hub://"


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_export, argv)


def _export(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    words = sort_words(argv, verb="export", own=KEYS, nodes=NODES, exclusive=[("run", "sweep")])
    _check(words)
    given = composed(words.overrides)
    validate(given)
    to = words.own.get("to", "")
    if not words.on("merge") and not to.startswith(HUB):
        _copy_run(_run_dir(words), to, words, given)
        return EXIT_DONE
    reach_with(given.storage)
    target = find_target(words.own, TrainConfig())
    if not {"run", "sweep"} & words.own.keys():
        print(f"{target.said}: the newest finished run", flush=True)
    directory = Path(target.source)
    with _alone(target):
        if words.on("merge"):
            directory = _merge(target, words, given)
        if to.startswith(HUB):
            _to_hub(target, directory, words)
        elif to:
            _copy_merged(target, directory, to, words, given)
    return EXIT_DONE


def _check(words: Words) -> None:
    """Raise ConfigError with all that does not go together."""
    own, merge, to = words.own, words.on("merge"), words.own.get("to", "")
    problems = []
    if not merge and not to:
        problems.append("to=PLACE or merge=true is missing; see llmkit export --help.")
    if "merge_base" in own and not merge:
        problems.append("merge_base: only merging has a base; add merge=true.")
    if own.get("merge_base", "original") not in ("original", "dequantized"):
        problems.append(f"merge_base={own['merge_base']}: dequantized or original.")
    if "merge_base" in own and any(split_override(one)[0] == "export.merge_base" for one in words.overrides):
        problems.append("merge_base is export.merge_base: give one of them.")
    if words.on("checkpoints") and (merge or to.startswith(HUB)):
        problems.append("checkpoints=true: only the copy of a run has them; leave merge= and hub:// out.")
    if "public" in own and not to.startswith(HUB):
        problems.append("public: only what goes to the hub (to=hub://ORG/NAME) is public or private.")
    if problems:
        raise ConfigError(*problems)


def _with_given(node: Any, given: Any, name: str, words: Words) -> Any:
    """A node of the run's config, with what the command line sets of it."""
    keys = [split_override(override)[0].partition(".") for override in words.overrides]
    return dataclasses.replace(node, **{key: getattr(given, key) for group, _, key in keys if group == name})


def _storage(run: TrainConfig | None, words: Words, given: TrainConfig) -> StorageConfig:
    return _with_given(run.storage if run else StorageConfig(), given.storage, "storage", words)


@contextlib.contextmanager
def _alone(target: Target) -> Iterator[None]:
    """Nobody else writes beside the target meanwhile, nor trains there."""
    with rundir.lock(target.home):
        yield


def _merge(target: Target, words: Words, given: TrainConfig) -> Path:
    """Merge the target and return the directory of the merged model."""
    from llmkit.serving.merging import merge, merged_directory

    settings: ExportConfig = _with_given(
        target.run.export if target.run else ExportConfig(), given.export, "export", words
    )
    if "merge_base" in words.own:
        settings = dataclasses.replace(settings, merge_base=words.own["merge_base"])
    directory = merged_directory(target)
    if target.run is not None:
        hide_libraries(target.run)
    merge(target, directory, settings, say=_say)
    return directory


def _run_dir(words: Words) -> Path:
    """The directory of the run to copy, which need not be finished if it is named."""
    run = words.own.get("run")
    if run is not None and is_remote(run):
        raise ConfigError(f"run={run}: the copy of a run is made from its directory; with merge=true a bucket will do.")
    if run is not None:
        return Path(run).expanduser()
    if "sweep" in words.own:
        return best_of_sweep(Path(words.own["sweep"]).expanduser())
    newest = newest_finished(RUNS)
    print(f"run={newest}: the newest finished run", flush=True)
    return newest


def _copy_run(run_dir: Path, to: str, words: Words, given: TrainConfig) -> None:
    """Copy a run as it is: final/ and records, and with checkpoints=true what another machine goes on from."""
    from llmkit.serving.publishing import begin_file_list, write_file_list
    from llmkit.storage import open_place
    from llmkit.training.checkpoints.mirror import publish
    from llmkit.training.checkpoints.remote import RemoteRun

    config = load(run_dir)
    place = open_place(to, _storage(config, words, given))
    checkpoints = None if words.on("checkpoints") else 0
    with rundir.lock(run_dir):  # a run at work changes what is copied
        if not (run_dir / rundir.FINAL).is_dir() and checkpoints == 0:
            raise ConfigError(f"run={run_dir} has no {rundir.FINAL}/ yet; checkpoints=true copies its checkpoints.")
        _refuse_other(RemoteRun(place), config, run_dir)
        begin_file_list(place, run_dir)
        publish(RemoteRun(place), run_dir, checkpoints=checkpoints)
        write_file_list(place, run_dir)
    print(f"{place.url} holds {run_dir}")


def _copy_merged(target: Target, directory: Path, to: str, words: Words, given: TrainConfig) -> None:
    from llmkit.serving.publishing import begin_file_list, publish_merged, write_file_list
    from llmkit.storage import open_place
    from llmkit.training.checkpoints.remote import RemoteRun

    place = open_place(to, _storage(target.run, words, given))
    _refuse_other(RemoteRun(place), target.run, target.home)
    begin_file_list(place, target.home)
    publish_merged(place, target.home, directory)
    write_file_list(place, target.home)
    print(f"{place.url} holds {directory}")


def _to_hub(target: Target, directory: Path, words: Words) -> None:
    from llmkit.serving.publishing import hub_address, publish_to_hub

    if target.source == str(directory) and directory.parent.name == rundir.CHECKPOINTS:
        raise ConfigError(f"{target.said}: a checkpoint holds more than a model; merge=true makes one of it.")
    address = hub_address(words.own["to"])
    if target.adapter is not None and target.source == str(directory) and not target.base.hub_id:
        print(
            "warning: the base of this adapter is not from the hub, so nobody there can load it; merge=true publishes "
            "a model that is whole.",
            file=sys.stderr,
        )
    print(publish_to_hub(directory, address, public=words.on("public"), say=_say))


def _refuse_other(there: "RemoteRun", config: TrainConfig | None, home: Path) -> None:
    """Raise ConfigError if the place holds another run, or something else."""
    from llmkit.serving.publishing import listed_model

    other, url = there.config(), there.place.url
    if other is not None and (config is None or (changed := differences(other, config))):
        why = f" ({'; '.join(changed)})" if config is not None else ""
        raise ConfigError(f"to={url} holds another run{why}; choose another to=.")
    if other is None and there.place.files() and listed_model(there.place) != home.name:
        raise ConfigError(f"to={url} holds other files; choose another to=.")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
