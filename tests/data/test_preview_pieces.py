"""Token pieces: together they are the row, a character is never cut, and what is left out is counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkit.data.preview.pieces import Gap, Piece, PieceReader, visible

ALL = {"most_pieces": 10**6, "most_runs": 10**6}


@pytest.fixture(scope="module")
def with_spaces():
    """A tokenizer like Llama 2's: spaces are underlines, and characters it lacks are bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def texts(parts):
    return [part.text for part in parts if isinstance(part, Piece)]


def read(tokenizer, text, **limits):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return PieceReader(tokenizer).parts(ids, [True] * len(ids), **(ALL | limits)), ids


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_the_pieces_together_are_the_text_and_their_ids_those_of_the_row(tiny_tokenizer, text):
    pieces, ids = read(tiny_tokenizer, text)

    assert "".join(texts(pieces)) == text
    assert [number for piece in pieces for number in piece.ids] == ids


@given(text=st.text("a b🍕é日\n", max_size=40))
@settings(deadline=None)
def test_spaces_are_kept_where_decoders_drop_the_first(with_spaces, text):
    ids = [1, *with_spaces(text, add_special_tokens=False)["input_ids"]]
    pieces = PieceReader(with_spaces).parts(ids, [True] * len(ids), **ALL)

    assert pieces[0].text == "<s>"
    assert "".join(texts(pieces)) == with_spaces.decode(ids)
    assert [number for piece in pieces for number in piece.ids] == ids


def test_the_bytes_of_a_character_are_one_piece(tiny_tokenizer, with_spaces):
    for tokenizer in (tiny_tokenizer, with_spaces):
        pieces, _ = read(tokenizer, "🍕🦉")
        assert texts(pieces)[-2:] == ["🍕", "🦉"]
        assert len(pieces[-1].ids) > 1


def test_bytes_of_a_character_are_not_joined_where_training_tells_them_apart(tiny_tokenizer):
    ids = tiny_tokenizer("🍕", add_special_tokens=False)["input_ids"]
    pieces = PieceReader(tiny_tokenizer).parts(ids, [False, *[True] * (len(ids) - 1)], **ALL)

    assert [number for piece in pieces for number in piece.ids] == ids
    assert next(piece.learnt for piece in pieces) is False
    assert all(piece.learnt for piece in pieces[1:])


def test_special_and_new_tokens_are_told_apart_from_text(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken("<é>", special=True, normalized=False)], special_tokens=True)
    new = tokenizer.convert_tokens_to_ids("<é>")
    ids = tokenizer("<é>hm<|end|>", add_special_tokens=False)["input_ids"]
    pieces = PieceReader(tokenizer, new=[new]).parts(ids, [True] * len(ids), **ALL)

    assert (pieces[0].text, pieces[0].kind) == ("<é>", "new")
    assert (pieces[-1].text, pieces[-1].kind) == ("<|end|>", "special")
    assert {piece.kind for piece in pieces[1:-1]} == {"ordinary"}


@given(
    text=st.text("ab🍕é", min_size=1, max_size=200),
    learnt_from=st.integers(0, 200),
    most=st.integers(10, 40),
)
@settings(deadline=None)
def test_a_shortened_row_says_what_is_missing_and_shows_the_end(tiny_tokenizer, text, learnt_from, most):
    ids = tiny_tokenizer(text + "<|end|>", add_special_tokens=False)["input_ids"]
    learnt = [i >= learnt_from for i in range(len(ids))]
    reader = PieceReader(tiny_tokenizer)
    parts = reader.parts(ids, learnt, most_pieces=most, most_runs=10)

    shown = [part for part in parts if isinstance(part, Piece)]
    gaps = [part for part in parts if isinstance(part, Gap)]
    assert sum(len(piece.ids) for piece in shown) + sum(gap.tokens for gap in gaps) == len(ids)
    learnt_shown = sum(len(piece.ids) for piece in shown if piece.learnt)
    assert learnt_shown + sum(gap.learnt for gap in gaps) == sum(learnt)
    assert shown[-1].text == "<|end|>"
    assert len(shown) <= 2 * most
    # What is shown is what the whole row has there.
    whole, places = reader.parts(ids, learnt, **ALL), [i for i, part in enumerate(parts) if isinstance(part, Gap)]
    if places:
        assert parts[: places[0]] == whole[: places[0]]
        behind = len(parts) - places[-1] - 1
        assert parts[-behind:] == whole[-behind:]
    else:
        assert parts == whole


def test_of_many_turns_those_in_the_middle_are_left_out(tiny_tokenizer):
    ids, learnt = [], []
    for turn in range(40):
        words = tiny_tokenizer(f"{turn % 10}<|end|>", add_special_tokens=False)["input_ids"]
        ids, learnt = ids + words, learnt + [turn % 2 == 1] * len(words)
    parts = PieceReader(tiny_tokenizer).parts(ids, learnt, most_pieces=100, most_runs=6)

    assert texts(parts) == [
        "0",
        "<|end|>",
        "1",
        "<|end|>",
        "2",
        "<|end|>",
        "7",
        "<|end|>",
        "8",
        "<|end|>",
        "9",
        "<|end|>",
    ]
    (gap,) = (part for part in parts if isinstance(part, Gap))
    assert (gap.tokens, gap.learnt) == (68, 34)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a↵\nb"),
        ("a\r\n", "a␍↵\n"),
        ("a\tb", "a⇥b"),
        ("\x1b[31m", "␛[31m"),
        ("\x7f\x9b\u202e\ufeff", "␡\\x9b\\u202e\\ufeff"),
        ("a\u00a0b", "a\\xa0b"),
        ("  two  ", "  two  "),
        ("日本 👩\u200d🚀 é", "日本 👩\u200d🚀 é"),
    ],
)
def test_all_of_a_text_can_be_seen_and_none_of_it_is_obeyed(text, shown):
    assert visible(text) == shown
