"""Encoding blocks on all cores, in order, with a few blocks in memory at a time."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from llmkit.data.encoding.batches import EncodedBlock
from llmkit.data.encoding.encoder import Encoder
from llmkit.data.reading.readers import Block
from llmkit.errors import DataError
from llmkit.processes import die_with_parent

MOST_PROCESSES = 32  # beyond, one process that reads cannot feed them

_encoder: Encoder  # of a worker process


def encode_blocks(blocks: Iterator[Block], encoder: Encoder, *, processes: int | None) -> Iterator[EncodedBlock]:
    """Every block encoded, in order. One block is encoded here; more of them in `processes` (unset: one per core).

    Raises DataError for the first row at fault, and if a process was killed.
    """
    count = processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    first = list(islice(blocks, 2))
    if count == 1 or len(first) < 2:
        yield from map(encoder, chain(first, blocks))
        return
    # Forked: the tokenizer is there at once, and importing what a fresh process needs would take longer than most data.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(encoder, os.getpid()))
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in chain(first, blocks):
            pending.append(pool.submit(_encode, block))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that prepares the data was killed, probably for its memory; data.num_proc=1 uses the least."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(encoder: Encoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    # The parent's handlers only take note of a signal; a worker has nothing to finish.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    if not die_with_parent(parent, signal.SIGKILL):
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _encode(block: Block) -> EncodedBlock:
    return _encoder(block)
