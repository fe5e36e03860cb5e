"""Long texts: finds the least number of tokens of a text, and the part that a truncated call reads, without tokenising all of it.

A tokenizer takes up to 650 bytes of memory for a character, and cuts only after it has tokenised everything. A text can be cut
between a word and the following space: the first part then has the same first tokens as the whole text, if no token of the
vocabulary and no step of the tokenizer crosses such a place. `LongTexts` checks this condition. Texts without such a place, such as
numbers with commas between them, or Chinese, are cut anywhere, far behind the wanted tokens. This cut counts only if two beginnings
of different length agree on the wanted tokens. Text adapters call it before they tokenise; it raises ItemError (too_long).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.items import ItemError

LONG = 1 << 16
"""A text up to this many characters is tokenised as it is."""
LONG_BOTH = 1 << 12
"""Both texts of a pair up to this many characters are tokenised as they are."""
FIRST_LOOK = 1 << 15
"""Characters of the first look; each later look takes twice as many."""
_REACH = 1 << 12
"""A place to cut must be found within so many characters."""
_CHARACTERS = 16
"""Characters to begin with for each wanted token."""
_TRIES = 16
_BEHIND = 512
"""Tokens at the end of a beginning that may differ from the whole text's: the cut may divide a word, a sign or a pair."""
_ENDLESS = 1 << 30
"""A larger bound means "no bound": a tokenizer without a bound has 10^30."""
_SPACES = "\u0120\u2581\u010a \n"
"""A space and a line break, as byte-level vocabularies, SentencePiece and plain text write them."""
_BLANKS = _SPACES + "\t\r\u0109\u010d"
_WORD, _ASCII_WORD = r"[^\W_]", r"[A-Za-z0-9]"
_ALONE = (True, "longest_first", "only_first")
_PROBE = "sea sea"


@dataclass(frozen=True, slots=True)
class Cutting:
    """The cut of a tokenizer's call: after `most` tokens.

    Some truncation strategies count both texts of a pair together, others each text alone.
    """

    most: int
    strategy: Any

    @classmethod
    def of(cls, tokenizer: Any, keywords: Mapping[str, Any]) -> Cutting | None:
        """The cut of a call with these keywords. None if the call cuts no text, or returns the rest of a text as well."""
        strategy = keywords.get("truncation")
        strategy = getattr(strategy, "value", strategy)
        most = keywords.get("max_length") or tokenizer.model_max_length
        if strategy in (None, False, "do_not_truncate") or most > _ENDLESS:
            return None
        return cls(int(most), strategy)


class LongTexts:
    """Looks at long texts with one tokenizer. Like the tokenizer, it is for one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cut: re.Pattern[str] | bool | None = False

    def require(self, text: str, longest: int, hint: str = "") -> None:
        """Raise ItemError (too_long) for a text that certainly has more than `longest` tokens.

        A text that passes may still be too long.
        """
        if len(text) > LONG and self._has_more(text, longest):
            found = f"the text has more than {longest} tokens, which the model takes at most"
            raise ItemError("too_long", f"{found}; {hint}" if hint else found, STAGE)

    def shortened(self, text: str, tokens: int) -> str:
        """A beginning of the text that holds more than `tokens` of its tokens, or the text itself."""
        found = self.prefix(text, tokens) if len(text) > LONG else None
        return text if found is None else found

    def prefix(self, text: str, tokens: int) -> str | None:
        """A beginning with more than `tokens` tokens, which are also the first tokens of the text.

        None if no beginning is found.
        """
        place = self._place()
        size = min(FIRST_LOOK, _CHARACTERS * (tokens + _CHARACTERS))
        while place is not None and size < len(text):
            end = _last(place, text, size)
            if end is None:
                break
            if self._count(text[:end]) > tokens + 1:  # an unknown word may be joined with the next word
                return text[:end]
            size *= 2
        return self._agreed(text, tokens, size)

    def _agreed(self, text: str, tokens: int, size: int) -> str | None:
        """A beginning, cut at any place. It counts only if a beginning of twice its length has the same first tokens; else None."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        while 2 * size < len(text):
            found = self._ids(text[:size])
            if len(found) > tokens + _BEHIND:
                kept = len(found) - _BEHIND
                return text[:size] if self._ids(text[: 2 * size])[:kept] == found[:kept] else None
            size *= 2
        return None

    def _has_more(self, text: str, tokens: int) -> bool:
        """Whether a beginning has so many tokens that the whole text must have more than `tokens`, whatever follows."""
        if self.prefix(text, tokens) is not None:
            return True
        size = FIRST_LOOK
        while size < len(text):
            if self._count(text[:size]) > 2 * tokens + _BEHIND:
                return True
            size *= 2
        return False

    def _count(self, text: str) -> int:
        return len(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return found

    def bounded(self, value: Any, keywords: Mapping[str, Any], longest: int, hint: str) -> Any:
        """A text, or a dict of a text and its pair, without the part that a call with these keywords would cut off.

        Raises ItemError (too_long) as `require` does if the call cuts nothing.
        """
        if not is_long(value):
            return value
        if isinstance(value, list):
            if not keywords.get("is_split_into_words"):
                return value
            return self._words(value, keywords, longest, hint)
        texts = {"": value} if isinstance(value, str) else dict(value)
        cutting = Cutting.of(self._tokenizer, keywords)
        if cutting is None:
            for one in texts.values():
                self.require(one, longest, hint)
            return value
        if not self._drops_the_end(keywords):
            return value
        if len(texts) == 2 and cutting.strategy in (True, "longest_first"):
            return dict(zip(texts, self._both(tuple(texts.values()), cutting.most), strict=True))
        shorter = {name: self._beside(texts, name, cutting) for name in texts}
        return shorter[""] if isinstance(value, str) else shorter

    def _words(self, words: list[str], keywords: Mapping[str, Any], longest: int, hint: str) -> list[str]:
        """The words that a call with these keywords reads. Each word is tokenised alone, so the first words decide."""
        cutting = Cutting.of(self._tokenizer, keywords)
        if cutting is not None and not self._drops_the_end(keywords):
            return words
        most = longest if cutting is None else cutting.most
        count = most + _CHARACTERS
        quiet = {"add_special_tokens": False, "truncation": False, "verbose": False}
        while count < len(words):
            if len(self._tokenizer(words[:count], is_split_into_words=True, **quiet)["input_ids"]) > most + 1:
                break
            count *= 2
        if cutting is None and count < len(words):
            text = f"the words have more than {longest} tokens, which the model takes at most"
            raise ItemError("too_long", f"{text}; {hint}" if hint else text, STAGE)
        return words[:count]

    def _both(self, texts: tuple[str, ...], most: int) -> tuple[str, ...]:
        """A pair that the tokenizer cuts from the longer text first, shortened before the call.

        The longer text must stay the longer text, and a short text must stay whole. Unshortened texts would be slow: the tokenizer
        pairs every cut-off piece of one text with every piece of the other, which takes the square of their lengths.
        """
        counts = [self._counted(one) for one in texts]
        less = 0 if counts[0] <= counts[1] else 1
        kept = list(texts)
        above = most
        if counts[less] > most:
            kept[less] = self._beginning(texts[less], most)
            above = self._count(kept[less])
        kept[1 - less] = self._beginning(texts[1 - less], above)
        return tuple(kept)

    def _counted(self, text: str) -> int:
        """Tokens of a text, counted piece by piece where it can be cut."""
        place, begin, count = self._place(), 0, 0
        while place is not None and len(text) - begin > FIRST_LOOK:
            end = _last(place, text, begin + FIRST_LOOK)
            if end is None or end <= begin:
                break
            count += self._count(text[begin:end])
            begin = end
        return count + self._count(text[begin:])

    def _beginning(self, text: str, tokens: int) -> str:
        """A beginning with more than `tokens` tokens, or the whole text. If no space is usable, it tries the ends of tokens."""
        found = self.prefix(text, tokens)
        if found is not None or not getattr(self._tokenizer, "is_fast", False):
            return text if found is None else found
        quiet = {"add_special_tokens": False, "truncation": False, "verbose": False}
        encoded = self._tokenizer(text, return_offsets_mapping=True, **quiet)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        for count in range(tokens + 2, min(tokens + 2 + _TRIES, len(ids))):
            start = text[: offsets[count - 1][1]]
            if self._tokenizer(start, **quiet)["input_ids"] == ids[:count]:
                return start
        return text

    def _drops_the_end(self, keywords: Mapping[str, Any]) -> bool:
        """Whether the call drops the end of a text. False if it cuts the start, or returns the end as further pieces."""
        pieces = keywords.get("return_overflowing_tokens") or keywords.get("stride")
        return not pieces and getattr(self._tokenizer, "truncation_side", "") == "right"

    def _beside(self, texts: Mapping[str, str], name: str, cutting: Cutting) -> str:
        """A text that the call cuts alone, shortened to a beginning with more than `cutting.most` tokens.

        Any other text unchanged.
        """
        others = [one for other, one in texts.items() if other != name]
        if cutting.strategy not in (_ALONE if not others else ("only_first",) if name == "text" else ("only_second",)):
            return texts[name]
        return self.shortened(texts[name], cutting.most)

    def _place(self) -> re.Pattern[str] | None:
        """The pattern of places to cut, after the first character; None if the tokenizer may look across words."""
        if isinstance(self._cut, bool):
            self._cut = _places(self._tokenizer)
        return self._cut


def is_long(value: Any) -> bool:
    """Whether a text, a dict of texts or a list of words must be checked before it is tokenised."""
    if isinstance(value, list):
        return sum([len(one) for one in value if isinstance(one, str)], len(value)) > LONG_BOTH
    texts = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, Mapping) else []
    sizes = [len(one) for one in texts if isinstance(one, str)]
    return bool(sizes) and (max(sizes) > LONG or (len(sizes) > 1 and min(sizes) > LONG_BOTH))


def _places(tokenizer: Any) -> re.Pattern[str] | None:
    if not getattr(tokenizer, "is_fast", False) or not _sees_words(tokenizer):
        return None
    ends = {before for token in tokenizer.get_vocab() for before in _before_spaces(token)}
    if any(end.isascii() and end.isalnum() for end in ends):
        return None
    word = _ASCII_WORD if any(not end.isascii() for end in ends) else _WORD
    return re.compile(f"{word}[ \\n]{word}")


def _before_spaces(token: str) -> list[str]:
    """The characters of a token, except blanks, that a space or a line break follows."""
    return [one for one, after in itertools.pairwise(token) if after in _SPACES and one not in _BLANKS]


def _sees_words(tokenizer: Any) -> bool:
    """Whether the tokenizer's model gets separate words, or can only make tokens of its vocabulary."""
    backend = tokenizer.backend_tokenizer
    kind = type(backend.model).__name__
    if kind == "BPE":
        return not backend.model.dropout
    if kind == "Unigram":
        return True
    if kind not in ("WordPiece", "WordLevel") or backend.pre_tokenizer is None:
        return False
    return len(backend.pre_tokenizer.pre_tokenize_str(_PROBE)) > 1


def _last(place: re.Pattern[str], text: str, size: int) -> int | None:
    """The end of the word before the last place to cut, within `_REACH` before `size`; None without such a place."""
    start = max(0, size - _REACH)
    found = None
    for match in place.finditer(text, start, size):
        found = match.start() + 1
    return found
