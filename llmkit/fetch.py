"""Bring models and data to a directory or a bucket, verified: `llmkit fetch model=mistral7b to=s3://bucket/models`."""

import logging
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from llmkit.byte_progress import in_bytes
from llmkit.cli import guarded, print_error
from llmkit.config import TrainConfig
from llmkit.config.data_files import TOKENS_FILE
from llmkit.config.grammar import split_override
from llmkit.config.nodes import schema_keys
from llmkit.data.fetching.destination import Destination
from llmkit.data.fetching.fetch import Fetched, fetch_script, fetch_source
from llmkit.data.progress import now_and_then
from llmkit.errors import EXIT_DONE, ConfigError, LlmkitError, did_you_mean
from llmkit.words import composed

HELP = """\
llmkit fetch model=NAME to=PLACE [model.revision=...] [allow=[...]] [ignore=[...]]
llmkit fetch -m model=NAME,NAME to=PLACE
llmkit fetch data=NAME | data.hub_id=ORG/NAME | data.path=FILE to=PLACE [data.split=...] [limit=N]
llmkit fetch data.script=FILE.py to=PLACE [limit=N]

Brings a model of the hub, or rows, to a directory or a bucket (to=s3://bucket/path), where training reads them:
model.path=PLACE, data.path=PLACE. Everything is verified; PLACE/manifest.json, written last, says what is there. Of a
model the same command again brings only what is missing.

  model        a shipped name (mistral7b) or org/name. Its weights come once, as safetensors; HF_TOKEN is used if set
  allow        shell patterns of the only files of the model that are fetched; ignore: of those that are not
  data         rows of the hub (with data.hub_config, data.split, data.revision) or of files, as checked JSON Lines
  data.script  your own Python file that yields rows; its code runs here, with your rights
  to           the place to fill; an earlier fetch of the same is brought up to date, nothing else is ever touched.
               With -m each model goes into a directory of its name there
  limit        take only the first N rows of each split, for a trial
  storage.*    how the bucket is reached, as in llmkit train

FILE.py:
  SPLITS = ("train", "test")       optional; one split, train, without it
  TOKENS = ["<USER>", "</USER>"]   optional; special tokens the model is to get

  def rows(split):                 or rows(), for one split
      yield {"question": "...", "answer": "..."}

Examples:
  llmkit fetch model=mistral7b to=s3://bucket/models/mistral7b
  llmkit fetch -m model=qwen3_0_6b,qwen3_8b to=models
  llmkit fetch data=gsm8k to=data/gsm8k
  llmkit fetch data.script=my_script.py to=data/mine limit=100"""

KEYS = {"data.script": "FILE.py", "to": "PLACE", "limit": "N", "allow": "[PATTERN]", "ignore": "[PATTERN]"}
DATA_KEYS = ("path", "hub_id", "hub_config", "split", "revision", "format", "columns")
SECONDS_PER_LINE = 5.0


@dataclass
class Wanted:
    """The command line: fetch's own words by key, and the overrides that make up a config."""

    own: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    several: bool = False

    def has(self, node: str) -> bool:
        """Whether a model, or data, is asked for."""
        keys = [split_override(override)[0] for override in self.overrides]
        return any(key.split(".")[0] == node for key in keys)

    def value(self, key: str) -> str | None:
        """What the command line says of `key`, as typed."""
        return dict(map(split_override, self.overrides)).get(key)

    def patterns(self, key: str) -> list[str]:
        """The shell patterns of `allow` or `ignore`."""
        return [word.strip(" '\"") for word in self.own.get(key, "").strip("[]").split(",") if word.strip()]


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_fetch, argv)


def _fetch(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    wanted = _wanted(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    if wanted.has("model"):
        return _fetch_models(wanted)
    to = wanted.own["to"]
    limit = int(wanted.own["limit"]) if "limit" in wanted.own else None
    progress = now_and_then(_say, seconds=SECONDS_PER_LINE)
    config = composed(wanted.overrides) if wanted.overrides else TrainConfig()
    destination = Destination(to, config.storage)
    if script := wanted.own.get("data.script"):
        # Shells expand a ~ at the start of a word only.
        fetched = fetch_script(Path(script).expanduser(), destination, limit=limit, progress=progress)
    else:
        split = config.data.split if wanted.value("data.split") else None
        fetched = fetch_source(config.data, destination, split=split, limit=limit, progress=progress)
    _report(fetched, to)
    return EXIT_DONE


def _fetch_models(wanted: Wanted) -> int:
    """All models, one after the other; one that cannot be had hides none of the others."""
    names = (wanted.value("model") or "").split(",") if wanted.several else [None]
    without = [override for override in wanted.overrides if split_override(override)[0] != "model"]
    configs = [composed(wanted.overrides if name is None else [f"model={name}", *without]) for name in names]
    code = EXIT_DONE
    for name, config in zip(names, configs, strict=True):
        to = wanted.own["to"]
        if name is not None:
            to = f"{to.rstrip('/')}/{name.rpartition('/')[2]}"
        try:
            _fetch_model(config, to, wanted)
        except LlmkitError as error:
            print_error(error)
            code = max(code, error.exit_code)
    return code


def _fetch_model(config: TrainConfig, to: str, wanted: Wanted) -> None:
    from llmkit.model.fetching import fetch_model

    if config.model.path or not config.model.hub_id:
        raise ConfigError(f"model={config.model.name}: is not from the hub; model=org/name, or a shipped name that is.")
    destination = Destination(to, config.storage)
    fetched = fetch_model(config.model, destination, allow=wanted.patterns("allow"), ignore=wanted.patterns("ignore"))
    there = "all there already" if not fetched.brought else f"{fetched.brought} of {len(fetched.files)} files brought"
    size = in_bytes(fetched.size)
    print(f"{to}: {fetched.hub_id} at {fetched.commit[:8]}, {len(fetched.files)} files, {size}, verified; {there}")
    sys.stdout.flush()
    if fetched.offline:
        print("warning: the hub cannot be reached; this is what its cache on this machine has.", file=sys.stderr)
    template = _template_words(config)
    print(f"next: llmkit train {shlex.join([f'model.path={to}', *template])}")


def _template_words(config: TrainConfig) -> list[str]:
    """What a shipped model's file says of its template, which its directory does not."""
    own = config.model.chat_template
    return [] if own == "keep-original" else [f"model.chat_template={own}"]


def _wanted(argv: list[str]) -> Wanted:
    """The words of the command line, sorted. Raises ConfigError with all that is wrong with them."""
    wanted, problems = Wanted(), []
    known = [*KEYS, "model", "data", *(f"data.{key}" for key in DATA_KEYS)]
    known += [key for key in schema_keys() if key.split(".")[0] in ("model", "storage")]
    for word in argv:
        key, equals, value = word.partition("=")
        if word in ("-m", "--multirun"):
            wanted.several = True
        elif key not in known and key.rpartition(".")[0] != "data.columns":
            meant = did_you_mean(key, known)
            if not equals and word.endswith(".py"):
                meant = f" Did you mean data.script={word}?"
            problems.append(f"{word}: fetch takes model=, data=, {', '.join(f'{own}=' for own in KEYS)}.{meant}")
        elif not value:
            problems.append(f"{key}: needs a value{f': {key}={KEYS[key]}' if key in KEYS else ''}.")
        elif key in wanted.own:
            problems.append(f"{key} is given twice: {wanted.own[key]} and {value}.")
        elif key in KEYS:
            wanted.own[key] = value
        else:
            wanted.overrides.append(word)
    problems += _contradictions(wanted) if not problems else []
    if problems:
        raise ConfigError(*problems)
    return wanted


def _contradictions(wanted: Wanted) -> list[str]:
    own, problems = wanted.own, []
    kinds = ["data.script"] * ("data.script" in own) + [node for node in ("model", "data") if wanted.has(node)]
    if not kinds:
        problems.append(
            "what to fetch is missing: model=NAME, data=NAME or data.script=FILE.py; see llmkit fetch --help."
        )
    elif len(kinds) > 1:
        problems.append(f"{' and '.join(kinds)}: fetch one of them at a time.")
    if "to" not in own:
        problems.append("to=PLACE is missing; see llmkit fetch --help.")
    if "limit" in own and not (own["limit"].isdecimal() and int(own["limit"]) > 0):
        problems.append(f"limit={own['limit']}: must be a whole number above 0.")
    if kinds == ["model"]:
        problems += ["limit: models have no rows."] * ("limit" in own)
        if "," in (wanted.value("model") or "") and not wanted.several:
            problems.append(f"model={wanted.value('model')}: several models; add -m.")
    elif kinds:
        problems += [f"{key}: only models have files to choose from." for key in ("allow", "ignore") if key in own]
        problems += ["-m: several at a time is for models; fetch data one by one."] * wanted.several
    if wanted.several and not wanted.value("model") and not problems:
        problems.append("-m: name the models, model=NAME,NAME.")
    return problems


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(fetched: Fetched, to: str) -> None:
    """Say what was made, what is odd about it, and the command that trains on it."""
    width = max(len(split) for split in fetched.splits) + len(".jsonl")
    print(f"{to}:")
    for split, written in fetched.splits.items():
        size = in_bytes(written.bytes)
        print(f"  {split + '.jsonl':<{width}}  {written.rows:,} rows, {size}, format {written.format}")
    if fetched.tokens:
        print(
            f"  {TOKENS_FILE:<{width}}  {len(fetched.tokens)} special tokens: training finds it beside the rows and "
            "adds each to the model as one token"
        )
    sys.stdout.flush()
    for warning in fetched.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"next: llmkit train {shlex.join(_training_words(fetched, to))}")


def _training_words(fetched: Fetched, to: str) -> list[str]:
    """The settings of a training run on the fetched directory: a split named validation or test is used as that."""
    words = ["recipe=dpo"] if fetched.preference else []
    words.append(f"data.path={to}")
    trained = "train" if "train" in fetched.splits else next(iter(fetched.splits))
    if trained != "train":
        words.append(f"data.split={trained}")
    layouts = {written.format for written in fetched.splits.values()}
    if "role_markers" in layouts and {"<USER>", "<ASSISTANT>"} <= set(fetched.tokens):
        words.append("data.chat_template=role-markers")  # the one that writes these tokens
    return words + [
        f"data.{role}={role}" for role in ("validation", "test") if role in fetched.splits and role != trained
    ]


if __name__ == "__main__":
    sys.exit(main())
