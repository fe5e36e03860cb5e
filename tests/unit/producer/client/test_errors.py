"""The tree of errors: complete, drawn, and understood by the command line."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import re
from typing import Any

import pytest

import pipefleet
from pipefleet import errors
from pipefleet.errors import (
    JobError,
    JobFailedError,
    PipefleetError,
    ResultTimeoutError,
    ServiceFullError,
    ServiceUnavailableError,
    UsageError,
    nearest,
)
from pipefleet.foreign import readable
from pipefleet.tasks import task_spec

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipefleetError)]


def drawn() -> dict[str, str]:
    """Every class in the drawing, and the one it hangs under."""
    parents: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            above[depth] = found[2]
            parents[found[2]] = above[depth - 1] if depth else ""
    return parents


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_a_word_and_an_exit_code_of_its_own(kind: type[PipefleetError]) -> None:
    assert re.fullmatch(r"[a-z_]+", kind.code)
    assert kind.exit_code in (1, 2, 3, 4)
    assert isinstance(kind.retryable, bool)
    assert kind.__doc__


def test_every_error_is_drawn_where_it_hangs() -> None:
    by_name = {kind.__name__: kind for kind in TREE}
    tree = drawn()
    assert set(tree) == set(by_name)
    for name, parent in tree.items():
        if parent:
            assert by_name[name].__bases__[0] is by_name[parent], name


def test_every_error_that_the_producer_raises_is_in_the_tree() -> None:
    for module in pkgutil.walk_packages(pipefleet.__path__, "pipefleet."):
        if not module.name.endswith("__main__"):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and issubclass(value, PipefleetError):
                    assert value in TREE, f"{module.name} has an error of its own"


def test_no_two_errors_that_callers_tell_apart_share_a_word() -> None:
    leaves = [kind for kind in TREE if kind is not JobError]
    assert len({kind.code for kind in leaves}) == len(leaves)


def test_exit_codes_are_the_documented_ones() -> None:
    for kind in TREE:
        special = {ServiceUnavailableError: 3, ServiceFullError: 3, ResultTimeoutError: 4}
        expected = special.get(kind, 1 if issubclass(kind, JobError) else 2)
        assert kind.exit_code == expected, kind
    assert [kind for kind in TREE if kind.retryable] == [
        ServiceUnavailableError,
        ServiceFullError,
        ResultTimeoutError,
    ]


def test_a_timeout_is_also_pythons_own() -> None:
    assert issubclass(ResultTimeoutError, TimeoutError)


def test_a_failed_job_carries_code_and_stage() -> None:
    error = JobFailedError("no", failure_code="bad_input", stage="decode")
    assert (str(error), error.failure_code, error.stage) == ("no", "bad_input", "decode")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("topk", " (did you mean 'top_k'?)"), ("zebra", ""), ("", ""), ("top_k", " (did you mean 'top_k'?)")],
)
def test_the_nearest_word_is_suggested_and_a_far_one_not(word: str, hint: str) -> None:
    assert nearest(word, ["top_k", "top_p", "num_beams"]) == hint


def test_what_the_caller_can_mend_is_a_value_error_and_nothing_else_is() -> None:
    assert [kind for kind in TREE if issubclass(kind, ValueError)] == [
        kind for kind in TREE if issubclass(kind, UsageError)
    ]


def test_an_unknown_task_is_a_key_error_as_in_transformers_and_its_message_has_no_quotes_around_it() -> None:
    with pytest.raises(KeyError) as caught:
        task_spec("text-clasification")
    assert str(caught.value).startswith("there is no task 'text-clasification' (did you mean 'text-classification'?)")


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_every_error_can_be_copied_and_pickled_with_all_that_it_tells(kind: type[PipefleetError], again: Any) -> None:
    told = {errors.ConflictError: {"job_id": "j"}, JobFailedError: {"failure_code": "bad_input", "stage": "decode"}}
    error = kind("no", **told.get(kind, {}))
    found = again(error)
    assert (type(found), str(found), vars(found)) == (kind, "no", vars(error))


def test_an_error_of_ours_inside_a_file_that_is_read_stays_what_it_is() -> None:
    with pytest.raises(errors.AccessDeniedError), readable("s3://b/run.json"):
        raise errors.AccessDeniedError("no")
