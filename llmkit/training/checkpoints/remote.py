"""A run's copy at another place, `checkpoint.remote`: the same files under the same names as in its run directory.

Of a checkpoint the files go first and the manifest last, and a reader takes only what has a manifest and every file it
lists. Imports nothing heavy: the driver asks too.
"""

import json
import os
import re
import shutil
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

from llmkit import config as configuration
from llmkit import durable, rundir
from llmkit.config import TrainConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.storage import Entry, Place, download_files, open_place, upload_files
from llmkit.training.checkpoints import manifest

OWNER = "owner.json"
OURS = json.dumps({"process": os.getpid(), "machine": os.uname().nodename, "id": uuid.uuid4().hex}).encode()
SENDING = threading.Lock()  # one checkpoint at a time, whichever thread sends it

# Read without running code: tensors, JSON, and state dicts that are loaded with weights_only.
PLAIN = re.compile(r"[^/]+\.(safetensors|json|jsonl|yaml|jinja)|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")
# Of a run directory, what is mirrored beside checkpoints/ and final/; result.json last, since it says "finished".
RECORDS = (
    rundir.CONFIG,
    rundir.METRICS,
    rundir.SAMPLES,
    rundir.RUNGS,
    rundir.DATA_AUDIT,
    rundir.PROBE,
    rundir.LOSS_PLOT,
    rundir.CONSOLE,
)


def run_place(config: TrainConfig, run_dir: Path) -> Place | None:
    """Where the run's copy is: `<checkpoint.remote>/<name of the run's directory>`; None without a remote place."""
    if config.checkpoint.remote is None:
        return None
    return open_place(config.checkpoint.remote, config.storage).place(run_dir.absolute().name)


class RemoteRun:
    """The copy of one run. Every method raises StorageError if the place does not answer as it should."""

    def __init__(self, place: Place):
        self.place = place
        self._sent: set[tuple[str, str]] = set()  # name and sha256 of files that have arrived

    def claim(self, run_dir: Path) -> None:
        """Say that this process writes there from now on, and that the run is not finished."""
        self.place.write(OWNER, OURS)
        self.place.write(rundir.CONFIG, (run_dir / rundir.CONFIG).read_bytes())
        self.place.delete([rundir.RESULT, rundir.FILES])

    def check_owner(self) -> None:
        """Raise TakenOver if another process has claimed the place since."""
        if self.place.read(OWNER) not in (None, OURS):
            raise TakenOver(f"{self.place.url}: another process has begun to write there; this one sends nothing more.")

    def config(self) -> TrainConfig | None:
        """The config of the run, or None if none has been copied there."""
        return read_config(self.place)

    def result(self) -> dict[str, Any] | None:
        """The run's result.json, or None while there is none."""
        content = self.place.read(rundir.RESULT)
        return None if content is None else json.loads(content)

    def checkpoints(self) -> dict[int, dict[str, Any]]:
        """Step -> manifest of the complete checkpoints, in the order of their steps."""
        there = self.place.files(rundir.CHECKPOINTS)
        found = {}
        for name in there:
            folder, _, file = name.rpartition("/")
            step = manifest.STEP.fullmatch(folder.rpartition("/")[2])
            if file != manifest.MANIFEST or step is None or (saved := self._manifest(name)) is None:
                continue
            if saved.get("step") == int(step[1]) and _complete(folder, saved, there):
                found[int(step[1])] = saved
        return dict(sorted(found.items()))

    def _manifest(self, name: str) -> dict[str, Any] | None:
        try:
            return manifest.parse(self.place.read(name) or b"")
        except ValueError:
            return None

    def fetch(self, step: int, saved: dict[str, Any], run_dir: Path, *, trust: bool) -> Path:
        """Make the checkpoint of `step` one of the run's own, verified byte for byte.

        Raises ConfigError if it holds files that could run code when loaded and `trust` is not given.
        """
        check_trust(self.place.url, saved, trust=trust)
        name = manifest.name_of(step)
        folder = run_dir / rundir.CHECKPOINTS
        partial = folder / f"{manifest.PARTIAL}-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = saved["files"]
        download_files(
            self.place.place(f"{rundir.CHECKPOINTS}/{name}"),
            files,
            partial,
            hashes={file: about["sha256"] for file, about in files.items()},
            sizes={file: about["size"] for file, about in files.items()},
        )
        return manifest.adopt(partial, run_dir, saved)

    def send(self, checkpoint: Path) -> None:
        """Copy a checkpoint there: files first, the manifest last. After a failure it goes on where it was."""
        folder = f"{rundir.CHECKPOINTS}/{checkpoint.name}"
        own = (checkpoint / manifest.MANIFEST).read_bytes()
        with SENDING:
            there = self.place.read(f"{folder}/{manifest.MANIFEST}")
            if there == own:
                return
            if there is not None:  # of an earlier attempt at this step: it must not vouch for a mixture
                self.place.delete([f"{folder}/{manifest.MANIFEST}"])
            for name, about in manifest.read_manifest(checkpoint)["files"].items():
                arriving = (f"{folder}/{name}", about["sha256"])
                if arriving not in self._sent:
                    self.place.upload(checkpoint / name, arriving[0], sha256=about["sha256"])
                    self._sent.add(arriving)
            self.place.write(f"{folder}/{manifest.MANIFEST}", own)

    def rotate(self, *, keep: int) -> None:
        """Remove all but the `keep` newest and the best, manifests first. Called after a new one is complete."""
        there = self.checkpoints()
        losses = {step: loss for step, saved in there.items() if (loss := saved.get("eval_loss")) is not None}
        best = {min(losses, key=lambda step: (losses[step], step))} if losses else set()
        for step in there.keys() - best - set(list(there)[-max(keep, 1) :]):
            self._remove(step)

    def remove_checkpoints(self) -> None:
        """Remove all, once nothing will go on from them."""
        for step in self.checkpoints():
            self._remove(step)

    def _remove(self, step: int) -> None:
        folder = f"{rundir.CHECKPOINTS}/{manifest.name_of(step)}"
        self.place.delete([f"{folder}/{manifest.MANIFEST}"])
        self.place.delete(self.place.files(folder))

    def send_records(self, run_dir: Path) -> None:
        """Copy config, metrics and the other small files as they are now."""
        for name in RECORDS:
            if (run_dir / name).exists():
                self.place.write(name, (run_dir / name).read_bytes())

    def send_final(self, run_dir: Path) -> None:
        """Copy `final/`: what is not there yet with the same content."""
        final = run_dir / rundir.FINAL
        names = sorted(path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file())
        place, listing = self.place.place(rundir.FINAL), f"{rundir.FINAL}.json"
        hashes = {name: durable.sha256_of(final / name) for name in names}
        there, known = place.files(), json.loads(self.place.read(listing) or b"{}")
        missing = [name for name in names if name not in there or known.get(name) != hashes[name]]
        upload_files(place, final, missing, hashes=hashes)
        place.delete((there.keys() & known.keys()) - hashes.keys())  # of an earlier model of this run
        self.place.write(listing, json.dumps(hashes, indent=2).encode())


class TakenOver(LlmkitError):
    """Another process writes to the copy of the run."""


def read_config(place: Place) -> TrainConfig | None:
    """The config.yaml of a run or of a checkpoint at some place; None if there is none."""
    content = place.read(rundir.CONFIG)
    if content is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, rundir.CONFIG).write_bytes(content)
        return configuration.load(Path(scratch))


def check_trust(url: str, saved: dict[str, Any], *, trust: bool) -> None:
    """Raise ConfigError if files of a checkpoint could run code when they are loaded (DeepSpeed pickles its own)."""
    strangers = [name for name in saved["files"] if not PLAIN.fullmatch(name)]
    if strangers and not trust:
        raise ConfigError(
            f"{url}: the checkpoint holds {strangers[0]}"
            f"{f' and {len(strangers) - 1} more files' if len(strangers) > 1 else ''} that can run code when loaded; "
            "checkpoint.trust=true loads them, if you trust whoever can write to that place."
        )


def _complete(folder: str, saved: dict[str, Any], there: dict[str, Entry]) -> bool:
    try:
        return all(there[f"{folder}/{name}"].size == about["size"] for name, about in saved["files"].items())
    except (KeyError, TypeError):
        return False
