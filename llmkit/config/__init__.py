"""One typed config for a run: schema, command line, composition, checks. Never imports torch or transformers."""

from llmkit.config.files import adopt_findings, differences, load, other_config, save
from llmkit.config.resolve import resolve
from llmkit.config.schema import TrainConfig
from llmkit.config.validate import validate, warnings

__all__ = [
    "TrainConfig",
    "adopt_findings",
    "differences",
    "load",
    "other_config",
    "resolve",
    "save",
    "validate",
    "warnings",
]
