"""The types of the task table's producer half: `TaskSpec` is a row, `Media` what an input is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipefleet.tasks.checks import Check, check_parameters
from pipefleet.tasks.generation import GENERATION as WRITTEN
from pipefleet.tasks.requirements import Known, Requirement


class Media(StrEnum):
    """What one value of an input is made of, and so how bytes become that value."""

    TEXT = "text"
    TEXTS = "text or list of texts"
    PROMPT = "text or chat"
    IMAGE = "image"
    IMAGES = "image or list of images"
    IMAGE_PAIR = "pair of images"
    AUDIO = "audio"
    VIDEO = "video"
    TABLE = "table"
    LABELS = "list of texts"
    DATA = "JSON"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One row: `media` of the main input, `fields` a dict input may have, allowed `parameters`, what comes back."""

    name: str
    media: Media | None
    """None where an input is always a dict of `fields`."""
    parameters: Mapping[str, Check]
    returns: str
    aliases: tuple[str, ...] = ()
    fields: Mapping[str, Media] = field(default_factory=dict)
    """Fields of an input that is a dict, e.g. a text and its pair; empty when the task takes no dicts."""
    required: tuple[str, ...] = ()
    """Fields that a dict must have."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Fields that may stand in for a required one, by its name."""
    carried: Mapping[str, Media] = field(default_factory=dict)
    """Fields of an input on the wire where something goes with its recording: `{audio, stride, …}`; empty where nothing can."""
    positional: tuple[str, ...] = ()
    """Names of the call's positional arguments where it has several, or fields beside the first: `pipe(image, question)`."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Earlier names of what a call takes, which transformers takes too, and the names they stand for."""
    crosses: bool = False
    """Whether fields that are lists are combined each with each, rather than one to one."""
    chat_media: tuple[Media, ...] = (Media.TEXT,)
    """What the parts of a chat's messages may hold."""
    tuples: tuple[str, ...] = ()
    """Keys of a result whose values transformers returns as tuples; JSON has none, so `pipeline()` makes them again."""
    bare_in_lists: bool = False
    """Whether a result that is a list of one is given without its list when the call was made with a list of inputs."""
    bare_in_streams: bool = False
    """The same for a call with a generator or a data set."""
    kept_with: tuple[str, ...] = ()
    """Parameters with which such a list stays."""
    nones: frozenset[str] = frozenset()
    """Parameters of which None is a value: it goes before what the pipeline says. Any other None says nothing."""
    merges: frozenset[str] = frozenset()
    """Mappings of a call that are laid over those of its pipeline; any other takes the place of the pipeline's."""
    tensors: tuple[str, ...] = ()
    """Keys of a result whose values are tensors at the caller; an empty one is the result itself, if `return_tensors` is true."""
    answers_one_alone: bool = False
    """Whether a list of one input is answered as that input alone, without a list around its result."""

    requires: tuple[Requirement, ...] = ()
    """What an input and its parameters must have together, as far as it can be told without the model."""

    def require(self, inputs: Any, known: Known) -> None:
        """Raise InputError or ParameterError where an input, with what is `known` of its parameters, can only fail."""
        for requirement in self.requires:
            requirement(self.name, inputs, known)

    def given(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of an input without those that are None and may be left out: None stands for them."""
        needed = [name for name in self.required if name not in self.instead]
        return {
            name: one for name, one in value.items() if one is not None or name in needed or name not in self.fields
        }

    def missing(self, value: Mapping[str, Any]) -> list[str]:
        """The required fields that neither stand in `value` nor are replaced by another."""
        return [name for name in self.required if name not in value and self.instead.get(name) not in value]

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise ParameterError unless every parameter is allowed for this task and within its bounds."""
        check_parameters(self.name, self.parameters, parameters, common=WRITTEN)

    def settled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters without each None that stands for what holds without the parameter."""
        checks = self.parameters
        return {
            name: value
            for name, value in parameters.items()
            if value is not None or (name in self.nones and name in checks and checks[name](None) is None)
        }
