"""Chat templates that ship with llmkit, and the user's own."""

from importlib import resources
from pathlib import Path

from llmkit.errors import ConfigError, did_you_mean


def shipped_templates() -> list[str]:
    """The names of the shipped templates."""
    return sorted(
        file.name[: -len(".jinja")] for file in resources.files(__name__).iterdir() if file.name.endswith(".jinja")
    )


def read_template(choice: str) -> str:
    """The Jinja text of a shipped template (by name) or of a file. Raises ConfigError if there is neither."""
    if choice in shipped_templates():
        return (resources.files(__name__) / f"{choice}.jinja").read_text(encoding="utf-8")
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    names = ["keep-original", *shipped_templates()]
    raise ConfigError(
        f"data.chat_template={choice}: neither a shipped template nor a file.{did_you_mean(choice, names)} "
        f"Shipped: {', '.join(names)}."
    )
