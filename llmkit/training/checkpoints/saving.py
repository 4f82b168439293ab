"""Saving while training goes on: tensors are copied to host memory, and a thread writes the copy and commits it."""

import contextlib
import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmkit import durable, rundir
from llmkit.errors import LlmkitError
from llmkit.host_memory import available_host_memory
from llmkit.training.checkpoints import manifest
from llmkit.training.memory import in_units

HOST_SHARE = 0.5  # of the memory the host has free may hold a copy; beyond it a save waits for the disk


class SaveError(LlmkitError):
    """A checkpoint that was asked for could not be written."""


class HostCopy:
    """Copies trees of tensors into host memory, always into the same buffers: new memory costs ten times the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, tree: Any, path: tuple[Any, ...] = ()) -> Any:
        """`tree` (dicts, lists, tuples of tensors and other values) with every tensor copied."""
        if isinstance(tree, torch.Tensor):
            return self._copied(tree.detach(), path)
        if isinstance(tree, dict):
            return {key: self.of(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            copied = [self.of(value, (*path, index)) for index, value in enumerate(tree)]
            return tuple(copied) if isinstance(tree, tuple) else copied
        return copy.deepcopy(tree)

    def _copied(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, and rotates the old ones out.

    Args:
        keep: how many of the newest stay.
        warn: told of a checkpoint that could not be written; training goes on without it.
        committed: called, in the thread that writes, with every new checkpoint; returns those that must stay for now.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        warn: Callable[[str], None],
        committed: Callable[[Path], set[Path]] = lambda _: set(),
    ):
        self.run_dir, self.keep, self.warn, self.committed = run_dir, keep, warn, committed
        self.stalled = 0.0  # seconds that training has waited for saves
        self.last_begun = time.monotonic()
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, contents: dict[str, Any], facts: dict[str, Any]) -> None:
        """Begin to save the checkpoint of `step`. Returns when its values are safe from the next training step.

        A failure is told at the next save, or by `wait`.

        Args:
            contents: file name -> tensors, a state dict, text, or a file that is replaced at times but never changed.
            facts: for the manifest.
        """
        began = self.last_begun = time.monotonic()
        self.settle("training goes on, and this save is tried")
        partial = self.run_dir / rundir.CHECKPOINTS / f"{manifest.PARTIAL}-{manifest.name_of(step)}"
        with self._failures_kept(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            values = _link_files(partial, contents)
            in_background = _tensor_bytes(values) < HOST_SHARE * available_host_memory()
            if in_background:
                values = self._host.of(values)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            work = copy_context().run  # what it says goes where the run's own words go
            given = (self._write, partial, step, values, facts)
            self._thread = threading.Thread(target=work, args=given, name=f"checkpoint {step}", daemon=True)
            self._thread.start()
            if not in_background:
                self._thread.join()
        self.stalled += time.monotonic() - began

    def commit(self, written: Path, step: int, contents: dict[str, Any], facts: dict[str, Any]) -> None:
        """Make files that somebody else wrote a checkpoint, with `contents` added, now. Raises SaveError."""
        self.last_begun = time.monotonic()
        with self._failures_kept(written):
            self._write(written, step, _link_files(written, contents), facts)
        self.wait()

    def wait(self) -> None:
        """Return when the last save is committed. Raises SaveError if it could not be."""
        error = self._join()
        if error is not None:
            raise SaveError(_explained(error, self.run_dir)) from error

    def settle(self, then: str) -> None:
        """Return when the last save is over; if it failed, say so and what is done `then`."""
        if (error := self._join()) is not None:
            self.warn(f"{_explained(error, self.run_dir)}; {then}.")

    def _join(self) -> Exception | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _write(self, partial: Path, step: int, values: dict[str, Any], facts: dict[str, Any]) -> None:
        with self._failures_kept(partial):
            for name, value in values.items():
                _write_file(partial / name, value)
            checkpoint = manifest.commit(partial, self.run_dir, step=step, facts=facts)
            manifest.rotate(self.run_dir, keep=self.keep, needed=self.committed(checkpoint))

    @contextlib.contextmanager
    def _failures_kept(self, partial: Path) -> Iterator[None]:
        """Whatever goes wrong is told by the thread that trains, and a full disk gets its room back."""
        try:
            yield
        except Exception as error:
            self._error = error
            shutil.rmtree(partial, ignore_errors=True)


def _link_files(directory: Path, contents: dict[str, Any]) -> dict[str, Any]:
    """Give the files among `contents` a second name in `directory`; returns the rest."""
    for name, value in contents.items():
        if isinstance(value, Path):
            (directory / name).unlink(missing_ok=True)  # what upstream may have written of the same name
            durable.second_name(value, directory / name)
    return {name: value for name, value in contents.items() if not isinstance(value, Path)}


def _write_file(path: Path, value: Any) -> None:
    if isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    elif path.suffix == ".safetensors":
        save_file({name: tensor.detach().contiguous() for name, tensor in value.items()}, path, {"format": "pt"})
    else:
        torch.save(value, path)


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(_tensor_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(_tensor_bytes, tree))
    return 0


def _explained(error: Exception, run_dir: Path) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    free = in_units(shutil.disk_usage(run_dir).free)
    return f"{run_dir / rundir.CHECKPOINTS}: a checkpoint could not be written ({reason}; {free} free on that disk)"
