"""The types of the task table's producer half: `TaskSpec` is a row, `Media` names the kind of a value.

Rows are data. Clients, pipelines and workers read them; `check` raises ParameterError, `require` also InputError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipefleet.tasks.checks import Check, check_parameters
from pipefleet.tasks.generation import GENERATION as WRITTEN
from pipefleet.tasks.requirements import Known, Requirement


class Media(StrEnum):
    """The kind of one value of an input. It decides how workers turn bytes into that value."""

    TEXT = "text"
    TEXTS = "text or list of texts"
    PROMPT = "text or chat"
    IMAGE = "image"
    IMAGES = "image or list of images"
    IMAGE_PAIR = "pair of images"
    AUDIO = "audio"
    AUDIOS = "audio or list of audio"
    VIDEO = "video"
    VIDEOS = "video or list of videos"
    TABLE = "table"
    LABELS = "list of texts"
    DATA = "JSON"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One row: the `media` of the main input, the `fields` of a dict, the allowed `parameters`, and the form of the result."""

    name: str
    media: Media | None
    """None if an input is always a dict of `fields`."""
    parameters: Mapping[str, Check]
    returns: str
    aliases: tuple[str, ...] = ()
    fields: Mapping[str, Media] = field(default_factory=dict)
    """Fields of an input that is a dict, such as a text and its pair; empty if the task takes no dicts."""
    required: tuple[str, ...] = ()
    """Fields that a dict must have."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Fields that may replace a required field: the replacement by the name of the required field."""
    carried: Mapping[str, Media] = field(default_factory=dict)
    """Fields of an input on the wire that may go with a recording: `{audio, stride, …}`; empty if the task has none."""
    positional: tuple[str, ...] = ()
    """Names of the call's positional arguments where it has several, or fields beside the first: `pipe(image, question)`."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Earlier names of what a call takes, which transformers takes too, and the names they stand for."""
    crosses: bool = False
    """Whether lists in several fields are combined each with each, not one to one."""
    chat_media: tuple[Media, ...] = (Media.TEXT,)
    """The kinds that the parts of a chat's messages may hold."""
    tuples: tuple[str, ...] = ()
    """Keys of a result whose values transformers returns as tuples. JSON has no tuples; `pipeline()` restores them."""
    bare_in_lists: bool = False
    """Whether a result that is a list of one loses the list in a call with a list of inputs."""
    bare_in_streams: bool = False
    """The same in a call with a generator or a data set."""
    kept_with: tuple[str, ...] = ()
    """Parameters with which such a list is kept."""
    nones: frozenset[str] = frozenset()
    """Parameters that have None as a value: there None replaces the pipeline's value. None for another parameter says nothing."""
    merges: frozenset[str] = frozenset()
    """Mappings of a call that are merged with those of its pipeline. Any other mapping replaces the pipeline's."""
    tensors: tuple[str, ...] = ()
    """Keys of a result whose values become tensors at the caller. An empty key is the result itself, with `return_tensors`."""
    answers_one_alone: bool = False
    """Whether a list of one input has the same answer as the input alone, without a list around the result."""

    requires: tuple[Requirement, ...] = ()
    """Checks of an input together with its parameters, which need no model."""

    def require(self, inputs: Any, known: Known) -> None:
        """Raise InputError or ParameterError for an input that can only fail with the `known` parameters."""
        for requirement in self.requires:
            requirement(self.name, inputs, known)

    def given(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of an input without optional fields that are None: None stands for a field that was left out."""
        needed = [name for name in self.required if name not in self.instead]
        return {
            name: one for name, one in value.items() if one is not None or name in needed or name not in self.fields
        }

    def missing(self, value: Mapping[str, Any]) -> list[str]:
        """The required fields that `value` lacks and no other field replaces."""
        return [name for name in self.required if name not in value and self.instead.get(name) not in value]

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise ParameterError unless every parameter is allowed for this task and within its bounds."""
        check_parameters(self.name, self.parameters, parameters, common=WRITTEN)

    def settled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters without every None that asks for the same as leaving the parameter out."""
        checks = self.parameters
        return {
            name: value
            for name, value in parameters.items()
            if value is not None or (name in self.nones and name in checks and checks[name](None) is None)
        }
