"""A source in tokens: made once, kept in the cache as Arrow, and memory-mapped ever after."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from importlib import metadata
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llmkit.config.schema import SourceConfig
from llmkit.data.encoding.batches import Notes
from llmkit.data.encoding.encoder import Encoder
from llmkit.data.encoding.workers import encode_blocks
from llmkit.data.formats.table import check_format, detect_format
from llmkit.data.reading.sources import Source
from llmkit.errors import DataError
from llmkit.storage import build_once, cache_dir

ROWS, FACTS = "rows.arrow", "facts.json"


@dataclass(frozen=True, kw_only=True)
class EncodedSource:
    """All examples of one source, none refused yet; `examples` has the columns of `batches.CONVERSATIONS`."""

    name: str
    layout: str
    rows: int  # of the source; examples may be more (split)
    parts: list[str]  # its files
    starts: list[tuple[int, int]]  # (part, its first example) of those that have any
    digest: str  # of all ids and labels
    notes: Notes
    own_tokens: list[str]  # that the run adds
    examples: datasets.Dataset

    def __len__(self) -> int:
        return len(self.examples)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers: `length`, `learnt` (tokens), `digest`, `group`, `row`; or `control`, true and false."""
        return self.examples.data.column(name).to_numpy()

    @property
    def begins_row(self) -> np.ndarray:
        """Of each example whether it is the first of its row, as most are; the parts of a row follow each other."""
        row = self.column("row")
        begins = np.append(True, row[1:] != row[:-1])
        begins[[first for _, first in self.starts]] = True
        return begins

    def place(self, index: int) -> str:
        """`FILE, row N` of an example."""
        part = next(part for part, first in reversed(self.starts) if first <= index)
        return f"{self.parts[part]}, row {self.examples[index]['row']}"


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What, beside the rows, decides how they are encoded."""

    tokenizer: PreTrainedTokenizerBase
    own_tokens: list[str]  # of data.special_tokens and beside the rows: meant to be in their text
    preference: bool
    train_on: str
    on_overlong: str
    max_length: int
    num_proc: int | None
    progress: Callable[[str, int], None] | None = None  # called with a source's name and the rows encoded so far

    @cached_property
    def key(self) -> str:
        """A hash of all of it, and of the code that encodes."""
        changes_rows = self.on_overlong in ("truncate_prompt", "split")
        parts = [
            self.tokenizer.backend_tokenizer.to_str(),
            json.dumps(self.tokenizer.special_tokens_map, default=str),
            json.dumps(self.tokenizer.chat_template),
            json.dumps(self.own_tokens),
            f"{self.preference} {self.train_on} {(self.on_overlong, self.max_length) if changes_rows else None}",
            _code_version(),
        ]
        return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def encode_source(source: Source, config: SourceConfig, options: EncodingOptions) -> EncodedSource:
    """The source in tokens, from the cache where nothing has changed. Raises DataError that names file and row.

    Args:
        config: what `source` was opened from.
    """
    choices = [config.format, sorted(config.columns.items()), config.limit]
    identity = json.dumps([source.fingerprint(), options.key, choices])
    target = cache_dir() / "data" / blake2b(identity.encode(), digest_size=16).hexdigest()
    build_once(target, lambda directory: _encode(source, config, options, directory))
    facts = json.loads((target / FACTS).read_text(encoding="utf-8"))
    notes = Notes.from_json(facts.pop("notes"))
    # Opened by path, not by load_dataset, which would look for a builder and copy.
    examples = datasets.Dataset.from_file(str(target / ROWS))
    return EncodedSource(
        name=source.name,
        parts=source.parts,
        notes=notes,
        own_tokens=options.own_tokens,
        examples=examples,
        **facts,
    )


def _encode(source: Source, config: SourceConfig, options: EncodingOptions, directory: Path) -> None:
    blocks = source.blocks()
    first = next(blocks, None)
    first_rows = first.rows() if first else []
    if first is None or not first_rows:
        raise DataError(f"{source.name}: holds no rows.")
    layout = config.format
    if layout == "auto":
        layout = detect_format(first_rows[0], config.columns, preference=options.preference)
    else:
        check_format(first_rows[0], layout, config.columns, preference=options.preference)
    encoder = Encoder(
        tokenizer=options.tokenizer,
        own_tokens=options.own_tokens,
        layout=layout,
        columns=dict(config.columns),
        preference=options.preference,
        train_on=options.train_on,
        on_overlong=options.on_overlong,
        max_length=options.max_length,
    )
    rows = examples = 0
    starts: list[tuple[int, int]] = []
    notes, digest = Notes(), blake2b(digest_size=16)
    with pa.OSFile(str(directory / ROWS), "wb") as file, pa.ipc.new_stream(file, encoder.schema) as writer:
        for block in encode_blocks(chain([first], blocks), encoder, processes=options.num_proc):
            part = source.parts.index(block.source)
            if not starts or starts[-1][0] != part:
                starts.append((part, examples))
            writer.write_batch(block.batch)
            rows, examples = rows + block.rows, examples + len(block.batch)
            notes.add(block.notes)
            if options.progress:
                options.progress(source.name, rows)
            for column in block.batch.columns:
                if pa.types.is_list(column.type):
                    digest.update(column.offsets.to_numpy())
                    digest.update(column.values.to_numpy())
    facts = {"layout": layout, "rows": rows, "starts": starts, "digest": digest.hexdigest(), "notes": notes.to_json()}
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")


@cache
def _code_version() -> str:
    """A hash of the code that reads, converts and encodes, and of the libraries it uses: any change prepares anew."""
    digest = blake2b(digest_size=16)
    data = Path(__file__).parents[1]
    folders = ("reading", "formats", "encoding")
    for file in (data / "examples.py", *(file for folder in folders for file in sorted(data.glob(f"{folder}/*.py")))):
        digest.update(file.read_bytes())
    for library in ("tokenizers", "transformers", "jinja2", "trl"):
        digest.update(metadata.version(library).encode())
    return digest.hexdigest()
