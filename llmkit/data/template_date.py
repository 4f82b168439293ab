"""The date that some chat templates write into every conversation (Llama 3's do), and the variable that sets it.

Such a template takes today's where it is given none, so that the same rows are other tokens tomorrow: a run that goes
on would not go on with the same data, and what is served would be dated later than what was learnt.
"""

import re
from datetime import datetime

from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

# The names that templates in use have for it; TRL 1.16 ships one of each: llama3_2, muse_glimmer.
DATE_VARIABLES = ("date_string", "current_date")

_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>[\"'])(?P<format>.*?)(?P=quote)\s*\)")


def writes_today(template: str) -> bool:
    """Whether the template asks for the date or time at which it is rendered."""
    return "strftime_now" in template


def date_variables(template: str) -> list[str]:
    """Those of DATE_VARIABLES that the template takes from its caller."""
    taken = meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))
    return [name for name in DATE_VARIABLES if name in taken]


def todays_date(template: str) -> dict[str, str]:
    """The variable for the date with today's in the template's own way; empty where the template has none."""
    written = _TODAY.search(template)
    if not written:
        return {}
    return dict.fromkeys(date_variables(template), datetime.now().strftime(written["format"]))
