"""Token ids -> the pieces of text they stand for, each with what training makes of it."""

import functools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no whole character
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so at most that many tokens
# Joiners and the wide space belong to the writing of several languages (and to emoji): they stay as they are.
KEPT = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}\N{IDEOGRAPHIC SPACE}"
PICTURES = {"\n": "↵\n", "\t": "⇥", "\x7f": "␡"} | {chr(i): chr(0x2400 + i) for i in range(32) if i not in (9, 10)}

Kind = Literal["ordinary", "special", "new"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, or the tokens of one character."""

    text: str
    ids: tuple[int, ...]
    learnt: bool
    kind: Kind


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens that are not shown."""

    tokens: int
    learnt: int


class PieceReader:
    """Reads pieces with one tokenizer.

    Args:
        new: the tokens that the model did not know before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, new: Iterable[int] = ()):
        self._backend = tokenizer.backend_tokenizer
        self._names = tokenizer.convert_ids_to_tokens
        self._new = frozenset(new)
        self._special = frozenset(tokenizer.all_special_ids)
        # Their content is their text; byte-level decoders would take it for bytes.
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def parts(
        self, ids: Sequence[int], learnt: Sequence[bool], *, most_pieces: int, most_runs: int
    ) -> list[Piece | Gap]:
        """The pieces of a row, shortened so that the end of every stretch that is shown can be seen.

        Args:
            most_pieces: tokens shown of a stretch that is learnt, or of one that is not, at least 10: three of five
                from its beginning, the others from its end.
            most_runs: stretches shown: half from the row's beginning, half from its end.
        """
        runs, begin = [], 0
        for flag, group in groupby(learnt):
            end = begin + sum(1 for _ in group)
            runs.append((begin, end, flag))
            begin = end
        first_hidden = most_runs // 2
        behind_hidden = max(len(runs) - (most_runs - first_hidden), first_hidden)
        parts: list[Piece | Gap] = []
        for number, run in enumerate(runs):
            if number == first_hidden < behind_hidden:
                hidden = [(end - begin, flag) for begin, end, flag in runs[first_hidden:behind_hidden]]
                parts.append(Gap(sum(n for n, _ in hidden), sum(n for n, flag in hidden if flag)))
            if not first_hidden <= number < behind_hidden:
                parts += self._shortened(ids, run, most_pieces)
        return parts

    def _shortened(self, ids: Sequence[int], run: tuple[int, int, bool], most: int) -> Iterator[Piece | Gap]:
        begin, end, flag = run
        if end - begin <= most:
            yield from (piece for _, piece in self._pieces(ids, begin, end, flag))
            return
        behind_head, tail = begin + (3 * most + 4) // 5, end - 2 * most // 5
        for position, piece in self._pieces(ids, begin, min(behind_head + LONGEST_CHARACTER, end), flag):
            if position >= behind_head:
                break
            behind = position + len(piece.ids)
            yield piece
        # From a little before the tail, so that it does not begin inside a character.
        pairs = self._pieces(ids, max(behind, tail - LONGEST_CHARACTER), end, flag)
        last = [(position, piece) for position, piece in pairs if position >= tail]
        if missing := last[0][0] - behind:
            yield Gap(missing, missing if flag else 0)
        yield from (piece for _, piece in last)

    def _pieces(self, ids: Sequence[int], begin: int, end: int, flag: bool) -> Iterator[tuple[int, Piece]]:
        """The pieces of a stretch with the places of their first tokens."""
        position = begin
        while position < end:
            token = ids[position]
            if token in self._added:
                yield position, Piece(self._added[token], (token,), flag, self._kind(token))
                position += 1
                continue
            behind, text = self._character(ids, position, end)
            some = tuple(ids[position:behind])
            yield position, Piece(text or "".join(self._names(list(some))), some, flag, self._kind(token))
            position = behind

    def _character(self, ids: Sequence[int], begin: int, end: int) -> tuple[int, str]:
        """Where the piece that begins at `begin` ends, and its text: a token, or as many as make a character whole."""
        before = self._before(ids, begin)
        broken = begin + 1, self._text(before, ids, begin, begin + 1)
        for behind in range(begin + 1, min(begin + LONGEST_CHARACTER, end) + 1):
            if behind > begin + 1:
                token = ids[behind - 1]
                if token in self._added or not self._decode([token]).startswith(INCOMPLETE):
                    break
            text = self._text(before, ids, begin, behind)
            if INCOMPLETE not in text:
                return behind, text
            if text == INCOMPLETE:  # the beginning of a character, or this very one
                broken = behind, text
        return broken

    def _before(self, ids: Sequence[int], begin: int) -> Sequence[int]:
        """The tokens of the character before: decoders strip a space from the first of all."""
        for size in range(1, min(LONGEST_CHARACTER, begin) + 1):
            if INCOMPLETE not in self._decode(ids[begin - size : begin]):
                return ids[begin - size : begin]
        return []

    def _text(self, before: Sequence[int], ids: Sequence[int], begin: int, end: int) -> str:
        """What the tokens add to the text of those before them."""
        there, through = self._decode(before), self._decode([*before, *ids[begin:end]])
        return through[len(there) :] if through.startswith(there) else self._decode(ids[begin:end])

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def _kind(self, token: int) -> Kind:
        if token in self._new:
            return "new"
        return "special" if token in self._special else "ordinary"


def visible(text: str) -> str:
    """The text with all of it to be seen: line breaks marked, and nothing in it that a terminal would obey."""
    return "".join(map(_visible, text))


@functools.lru_cache(maxsize=4096)
def _visible(character: str) -> str:
    if character in PICTURES:
        return PICTURES[character]
    category = unicodedata.category(character)
    hidden = category in ("Cc", "Cf", "Cs", "Zl", "Zp") or (category == "Zs" and character != " ")
    return character.encode("unicode_escape").decode() if hidden and character not in KEPT else character
