"""Checks of job parameters: small functions that rows of the task table put together.

A check takes a value and returns the fault, as the end of a sentence, or None. Hugging Face call arguments can run code
(`custom_generate`), render a caller's template (`chat_template`) or reach a command line (`tesseract_config`), and most pipelines
ignore arguments that they do not know. So a parameter passes only if a row names it and its check accepts the value.
`check_parameters` raises ParameterError.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipefleet.errors import ParameterError, nearest
from pipefleet.tasks.refused import why_refused

Check = Callable[[Any], "str | None"]
MOST_OF_THEM = 8
"""A list of parameters has one word for the arguments of generate() if a task takes at least so many of them."""


def boolean(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "must be true or false"


def integer(low: int, high: int) -> Check:
    """A whole number from `low` to `high`, both included."""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return f"must be a whole number from {low} to {high}"
        return None

    return check


def number(low: float, high: float) -> Check:
    """A finite number from `low` to `high`, both included."""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return f"must be a number from {low:g} to {high:g}"
        return None

    return check


def choice(*words: str) -> Check:
    """One of `words`."""

    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in words else f"must be one of {', '.join(words)}"

    return check


def text(longest: int = 10_000, *, least: int = 0) -> Check:
    """A string of at least `least` and at most `longest` characters."""

    def check(value: Any) -> str | None:
        ok = isinstance(value, str) and least <= len(value) <= longest
        return None if ok else f"must be a text of {f'{least} to' if least else 'at most'} {longest} characters"

    return check


def template(longest: int = 1000) -> Check:
    """A text with one plain `{}` and no other brace. `str.format` of other texts can read attributes or make gigabytes."""

    def check(value: Any) -> str | None:
        ok = isinstance(value, str) and len(value) <= longest
        ok = ok and "{}" in value and value.count("{") == 1 and value.count("}") == 1
        return None if ok else f"must be a text of at most {longest} characters with one {{}} in it and no other brace"

    return check


def some_text(check: Check, *, commas: bool = False) -> Check:
    """A text, or a list of texts, that passes `check` and has more than spaces (with `commas`, than spaces and commas)."""
    nothing = " \t\r\n\v\f," if commas else None

    def filled(value: Any) -> str | None:
        texts = [value] if isinstance(value, str) else value
        return check(value) or (
            None if any(one.strip(nothing) for one in texts) else "must hold a text that is not empty"
        )

    return filled


def list_of(item: Check, longest: int = 1000, *, least: int = 0) -> Check:
    """A list of at least `least` and at most `longest` values that all pass `item`."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or not least <= len(value) <= longest:
            return f"must be a list of {f'{least} to' if least else 'at most'} {longest} values"
        wrong = next((problem for problem in map(item, value) if problem), None)
        return f"holds a value that {wrong}" if wrong else None

    return check


def either(*checks: Check) -> Check:
    """A value that passes at least one of `checks`."""

    def check(value: Any) -> str | None:
        problems = [one(value) for one in checks]
        return None if None in problems else " or ".join(str(problem) for problem in problems)

    return check


def optional(check: Check) -> Check:
    """None, which is kept as a value, or a value that passes `check`."""

    def accepts(value: Any) -> str | None:
        return None if value is None else check(value)

    return accepts


def null(value: Any) -> str | None:
    """None."""
    return None if value is None else "must be null"


def word(*words: str) -> Check:
    """One of `words`, in large or small letters."""
    check = choice(*words)

    def accepts(value: Any) -> str | None:
        return check(value.lower() if isinstance(value, str) else value)

    return accepts


def pair_of(first: Check, second: Check) -> Check:
    """A list of two values, one for each check."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return "must be a list of two values"
        wrong = next((problem for problem in (first(value[0]), second(value[1])) if problem), None)
        return f"holds a value that {wrong}" if wrong else None

    return check


def mapping_of(allowed: Mapping[str, Check]) -> Check:
    """A JSON object whose keys and values pass `allowed`; a value may be None."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return "must be an object"
        for name, item in value.items():
            if name not in allowed:
                reason = why_refused("", str(name))
                why = f": {reason}" if reason else nearest(str(name)[:40], allowed)
                return f"may not hold {str(name)[:40]!r}{why}"
            problem = None if item is None else allowed[name](item)
            if problem:
                return f"holds {name!r}, which {problem}"
        return None

    return check


def check_parameters(
    task: str, allowed: Mapping[str, Check], given: Mapping[str, Any], *, common: Collection[str] = ()
) -> None:
    """Raise ParameterError for the first parameter that `allowed` does not name or whose check fails.

    None passes: it asks for the same as leaving the parameter out. The error does not list the `common` parameters (arguments of
    generate()).
    """
    if not isinstance(given, Mapping):
        raise ParameterError(f"parameters are names with values, not a {type(given).__name__}")
    for name, value in given.items():
        if name not in allowed:
            reason = why_refused(task, str(name))
            if reason:
                raise ParameterError(f"{task} takes no parameter {str(name)[:40]!r}: {reason}")
            raise ParameterError(
                f"{task} takes no parameter {str(name)[:40]!r}{nearest(str(name)[:40], allowed)}; it takes "
                f"{_known(allowed, common)}"
            )
        problem = None if value is None else allowed[name](value)
        if problem:
            raise ParameterError(f"parameter {name!r} of {task} {problem}")


def _known(allowed: Mapping[str, Check], common: Collection[str]) -> str:
    """The parameters of a task for a sentence, with one word for the arguments of generate() if it takes most of them."""
    shared = allowed.keys() & set(common)
    if len(shared) < MOST_OF_THEM:
        return ", ".join(sorted(allowed)) or "none"
    return f"{', '.join(sorted(allowed.keys() - shared)) or 'none'}, and arguments of generate()"
