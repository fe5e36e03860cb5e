"""The arguments of a pipeline's call become inputs and parameters, by the rules of transformers' own pipelines.

Fields come as keywords, in their order, or in a dict. Each is one value, a list, a generator or a data set. `FleetPipeline` calls
`arguments_of`. InputError says that arguments do not go together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import GeneratorType
from typing import Any

from pipefleet.errors import InputError
from pipefleet.inputs.prepare import is_file, is_message, is_table
from pipefleet.tasks import Media, TaskSpec

_MAIN = ("inputs", "text_inputs", "sequences", "text", "images", "image", "audio", "audios", "videos", "video")
"""Names of the first argument in transformers' pipelines."""
_SINGLE = (Media.TEXT, Media.IMAGE, Media.AUDIO, Media.VIDEO)
"""Kinds of fields that hold one value, so that a list means several inputs."""
_LISTED = (Media.IMAGES, Media.AUDIOS, Media.VIDEOS)
"""Kinds of fields that hold one medium or a list of them."""
_OF_ONE = ("__array_interface__", "detach", "save", "get_all_samples", "get_frame_at")
"""Attributes of arrays, tensors, pictures and decoders of torchcodec. Each is one input, though it has items."""


class Joined(list[Any]):
    """Inputs that transformers takes for one input. Their results are joined into one list."""


class Beside(dict[str, Any]):
    """The fields of a call with a plain text and other fields beside it. The result has the form of a text's result."""


def arguments_of(spec: TaskSpec, inputs: tuple[Any, ...], parameters: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inputs and the parameters of a call. Raises InputError if there is no input, or an input is given twice.

    The inputs are one input, a list, a `Joined`, a `Beside`, or a lazy iterable. If a generator may be a chat, its first item is
    taken to see.
    """
    wanted = {spec.renamed.get(name, name): value for name, value in parameters.items()}
    inputs, fields = _named(spec, _ordered(spec, inputs, wanted), wanted)
    if inputs and fields:
        raise InputError(f"{spec.name} was given an input and {', '.join(fields)} beside it; put them into one dict")
    if fields:
        return _each(spec, fields), wanted
    if not inputs:
        raise InputError(f"{spec.name} needs an input as its first argument")
    given = inputs[0]
    if spec.fields and isinstance(given, Mapping):
        return _each(spec, given), wanted
    return (_prompts(spec, given) if spec.media is Media.PROMPT else given), wanted


def is_dataset(value: Any) -> bool:
    """Whether `value` gives inputs one by one: an iterator, a column or set of `datasets`, a torch data set.

    A text, bytes, a dict, an open binary file, a picture, an array, a tensor, a decoder and a table are one input each.
    """
    single = isinstance(value, str | bytes | bytearray | memoryview | Mapping)
    single = single or (is_file(value) and not hasattr(value, "encoding"))  # a text file gives lines
    if single or is_table(value) or any(hasattr(value, name) for name in _OF_ONE):
        return False
    return hasattr(value, "__iter__") or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))


def each_of(values: Any) -> Iterator[Any]:
    """The values of an iterable, or of a torch data set, which has a length and may answer beyond its end."""
    return iter(values) if hasattr(values, "__iter__") else (values[index] for index in range(len(values)))


def _ordered(spec: TaskSpec, inputs: tuple[Any, ...], wanted: dict[str, Any]) -> tuple[Any, ...]:
    """The first argument, if there is one. The arguments behind it go into `wanted`, by name."""
    if len(inputs) > max(1, len(spec.positional)):
        raise InputError(f"{spec.name} takes {max(1, len(spec.positional))} positional arguments, not {len(inputs)}")
    if len(inputs) < 2:
        main = [name for name in _MAIN if name in wanted and name not in spec.parameters and name not in spec.fields]
        return inputs or ((wanted.pop(main[0]),) if len(main) == 1 else ())
    named = dict(zip(spec.positional, inputs, strict=False))
    if twice := named.keys() & wanted.keys():
        raise InputError(f"{spec.name} was given {sorted(twice)[0]} twice")
    wanted.update(named)
    return (wanted.pop(spec.positional[0]),) if spec.positional[0] not in spec.fields else ()


def _named(
    spec: TaskSpec, inputs: tuple[Any, ...], wanted: dict[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The first argument and the fields. With fields beside it, the first argument is one of the fields."""
    fields = spec.given(
        {
            name: wanted.pop(name)
            for name in spec.fields
            if name in wanted and (name not in spec.parameters or _is_nested(wanted[name]))
        }
    )
    first = spec.positional[0] if spec.positional else None
    if not inputs or not fields or first not in spec.fields.keys() - fields.keys() or isinstance(inputs[0], Mapping):
        return inputs, fields
    own = spec.given({str(first): inputs[0], **fields})
    return (), Beside(own) if isinstance(inputs[0], str) else own


def _each(spec: TaskSpec, given: Mapping[str, Any]) -> Any:
    """One dict, or a dict for each position of the fields that are lists or lazy. Single values go into every dict."""
    kinds = spec.fields
    fields = {name: _opened(spec, name, value) for name, value in spec.given(given).items()}
    if spec.crosses and any(isinstance(value, list | tuple) for value in fields.values()):
        return _crossed(spec, fields)
    lists = {name: value for name, value in fields.items() if _is_several(kinds.get(name), value)}
    lazy = {name: value for name, value in fields.items() if _is_lazy(kinds.get(name), value)}
    if lazy:
        return _together(spec, fields, {**lists, **lazy})
    if not lists:
        return given if isinstance(given, Beside) else fields
    # Beside several texts, a list of media has one for each text; beside one text, all of them belong to it.
    lists |= {name: fields[name] for name in fields if _is_list_of_media(kinds.get(name), fields[name])}
    if len({len(value) for value in lists.values()}) > 1:
        raise InputError(f"{', '.join(lists)} are lists of different lengths")
    each = list(_together(spec, fields, lists))
    return Joined(each) if _is_one_call(spec, fields) else each


def _together(spec: TaskSpec, fields: Mapping[str, Any], several: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A dict for each position of the fields in `several`. Raises InputError if one field ends before another."""
    try:
        for values in zip(*map(each_of, several.values()), strict=True):
            yield {**fields, **dict(zip(several, values, strict=True))}
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise InputError(f"{', '.join(several)} of {spec.name} have different lengths") from None


def _crossed(spec: TaskSpec, fields: Mapping[str, Any]) -> Any:
    """Each value of one field with each value of the others. The values of the last field vary least."""
    if endless := [name for name, value in fields.items() if _is_lazy(spec.fields.get(name), value)]:
        raise InputError(f"{endless[0]} of {spec.name} is taken lazily and cannot be combined with a list; pass dicts")
    names = [name for name in spec.fields if name in fields][::-1]
    values = [value if isinstance(value, list | tuple) else [value] for value in map(fields.__getitem__, names)]
    return [dict(zip(names[::-1], one[::-1], strict=True)) for one in itertools.product(*values)]


def _opened(spec: TaskSpec, name: str, value: Any) -> Any:
    """A field's value; as a list if transformers reads it at once and not one by one."""
    if spec.crosses and _is_key_dataset(value):
        return list(each_of(value))
    return _chats_of(value) if spec.fields.get(name) is Media.PROMPT else value


def _prompts(spec: TaskSpec, given: Any) -> Any:
    given = _chats_of(given)
    return Joined(given) if _is_one_call(spec, {"text": given}) and not isinstance(given, tuple) else given


def _chats_of(value: Any) -> Any:
    """`value`; as a list if it is a generator of messages, or a `KeyDataset` of messages or chats."""
    if _is_key_dataset(value):
        first = value[0] if len(value) else None
        return list(each_of(value)) if is_message(first) or _is_chat(first) else value
    if not isinstance(value, GeneratorType):
        return value
    taken = list(itertools.islice(value, 1))
    return [*taken, *value] if taken and is_message(taken[0]) else _again(taken, value)


def _again(taken: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from taken
    yield from rest


def _is_key_dataset(value: Any) -> bool:
    """Whether `value` is transformers' KeyDataset. transformers need not be installed here."""
    return any(
        (one.__module__, one.__name__) == ("transformers.pipelines.pt_utils", "KeyDataset")
        for one in type(value).__mro__
    )


def _is_one_call(spec: TaskSpec, fields: Mapping[str, Any]) -> bool:
    """Whether transformers takes these texts for one input: texts beside other fields, or of a task where texts come first."""
    if spec.media is not Media.PROMPT or not _is_text_list(fields.get("text")):
        return False
    return len(fields) > 1 or isinstance(fields["text"], tuple) or spec.positional[:1] == ("text",)


def _is_several(kind: Media | None, value: Any) -> bool:
    """Whether the value of a field stands for several inputs."""
    if not isinstance(value, list | tuple):
        return False
    if kind is Media.LABELS:
        return _is_nested(value)
    return bool(value) and not is_message(value[0]) if kind is Media.PROMPT else kind in _SINGLE


def _is_lazy(kind: Media | None, value: Any) -> bool:
    """Whether the value of a field gives its items one by one."""
    return kind in (*_SINGLE, *_LISTED, Media.PROMPT) and not isinstance(value, list | tuple) and is_dataset(value)


def _is_nested(value: Any) -> bool:
    """A list of lists: labels for each of several pictures."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and is_message(value[0])


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str)


def _is_list_of_media(kind: Media | None, value: Any) -> bool:
    return kind in _LISTED and isinstance(value, list | tuple)
