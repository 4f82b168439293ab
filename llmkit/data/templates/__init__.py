"""Chat templates that ship with llmkit, the user's own, and the values a template takes where nobody gives any.

The variables of a run (`data.chat_template_kwargs`) are saved with its model as the defaults of its template, so that
chat and serving render as training did without being told. They stand in front of the template, in one line that a
comment marks, and are found again by it: a run that starts from that model takes them off and does not stack them.
"""

import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError, did_you_mean

# What transformers' apply_chat_template passes itself, or takes as an argument of its own.
TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation")
KEYWORDS = ("and", "or", "not", "in", "is", "if", "else", "for", "set", "true", "false", "none", "loop", "self")

_DEFAULTS = re.compile(r"\{#- data\.chat_template_kwargs: (?P<values>.*?) -#\}[^\n]*\n")


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


def with_defaults(template: str, values: dict[str, Any]) -> str:
    """`template` with `values` for the variables that its caller leaves out; defaults it had from here are replaced.

    Raises ConfigError for a name that is no variable, and for a value that is not JSON.
    """
    template, _ = split_defaults(template)
    if not values:
        return template
    kept = json.dumps(values, ensure_ascii=False, default=_refuse).replace("#}", r"\u0023}")
    lines = [
        f"{{%- if {_name(name)} is not defined %}}{{%- set {name} = {jinja_literal(value)} %}}{{%- endif %}}"
        for name, value in values.items()
    ]
    # The line break after the last tag belongs to it (transformers trims blocks): the template begins as it always did.
    return f"{{#- data.chat_template_kwargs: {kept} -#}}{''.join(lines)}\n{template}"


def split_defaults(template: str) -> tuple[str, dict[str, Any]]:
    """A template as it was before `with_defaults`, and the values that were put in front of it."""
    found = _DEFAULTS.match(template)
    return (template[found.end() :], json.loads(found["values"])) if found else (template, {})


def jinja_literal(value: Any) -> str:
    """A JSON value as Jinja writes it. Raises ConfigError for anything else."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(jinja_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{jinja_literal(str(key))}: {jinja_literal(item)}" for key, item in value.items()) + "}"
    return _refuse(value)


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in (*TAKEN, *KEYWORDS):
        raise ConfigError(
            f"data.chat_template_kwargs.{name}: not a variable that a chat template can be given; a name like "
            "enable_thinking."
        )
    return name


def _refuse(value: Any) -> Any:
    raise ConfigError(
        f"data.chat_template_kwargs: {value!r} is not JSON; use text, numbers, true, false, null or lists."
    )
