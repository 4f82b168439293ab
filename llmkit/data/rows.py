"""A raw row and where it stands: what every message about data names."""

import json
from dataclasses import dataclass
from typing import Any

EXCERPT = 200  # characters of a row that a message shows


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row and where it stands, for messages."""

    values: dict[str, Any]
    source: str  # the file, or the hub's org/name
    number: int  # line of the file or place in its array (from 1), or index in a table (from 0)

    def place(self) -> str:
        """`FILE, row N`, with the row's own id where it has one."""
        own = self.values.get("id")
        return f"{self.source}, row {self.number}" + (f" (id {own})" if isinstance(own, str | int) else "")

    def excerpt(self) -> str:
        """The first characters of the row, as JSON."""
        return json.dumps(self.values, ensure_ascii=False, default=str)[:EXCERPT]
