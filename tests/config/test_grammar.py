"""Python values written in Hydra's grammar come back from Hydra's parser as they were."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hypothesis import given
from hypothesis import strategies as st

from llmkit.config.grammar import split_override, to_grammar

PARSER = OverridesParser.create()
# A command line holds no NUL, and text that is no Unicode (lone surrogates) is no text.
TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name.lower() not in ("null", "true", "false", "nan", "inf")
)


def parsed(text: str):
    override = PARSER.parse_override(f"key={text}")
    assert not override.is_sweep_override()
    return plain(override.value())


def plain(value):
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


@given(TEXT)
def test_any_text_comes_back_as_it_was(text):
    assert parsed(to_grammar(text)) == text


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8))
def test_any_value_comes_back_with_its_type(value):
    back = parsed(to_grammar(value))

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.r=4", ("lora.r", "4")),
        ("+data.path=a=b", ("data.path", "a=b")),
        ("++x=", ("x", "")),
        ("~model", ("model", "")),
    ],
)
def test_an_override_splits_at_its_first_equals_sign(override, expected):
    assert split_override(override) == expected
