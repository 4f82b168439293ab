"""What goes wrong with a place where files are kept."""

from llmkit.errors import LlmkitError


class StorageError(LlmkitError):
    """A place did not do what was asked: says what, which address, why, and what to check.

    Only "there is no such file" is not an error: reading then gives None. So whoever decides to start afresh because
    nothing is there knows that the place said so, and did not merely fail to answer.
    """


class DamagedError(StorageError):
    """The place answers, but what it holds is not what was put there."""
