"""The adapter of image-text-to-text and any-to-any: chats and texts with pictures, sound and video in one generate() call.

Prompts are padded on the left as in `generate.py`. Tensors of media have no row for each prompt: they stand one after the other, in
the order of the prompts, and a prompt without media adds nothing. `EqualMultimodal` serves models that cannot do this. Raises
ItemError (bad_input, too_long) for prompts that cannot be read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AnyToAnyPipeline, GenerationMixin
from transformers.pipelines import any_to_any
from transformers.utils.chat_template_utils import Chat

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.writing.equal_shapes import EqualWriter, Writing
from pipefleet_workers.adapters.writing.generate import (
    Request,
    TextGenerator,
    context_length,
    filled,
    learnt_positions,
    require_chat,
)
from pipefleet_workers.adapters.writing.parameters import nested
from pipefleet_workers.inputs.video import Clip
from pipefleet_workers.items import Assembly, ItemError, Unit

VIDEO_FRAMES = 32
"""Most frames of a video that a model sees, evenly spread."""
_PER_TOKEN = ("attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""Inputs with a place for each token. All other inputs belong to media, and stand one after the other."""
_EXAMPLE_PIXELS, _EXAMPLE_SAMPLES, _WORDS_ALONE = 224, 1_600, 10
_MEDIA = ("images", "videos", "audio")


class MultimodalGenerator(TextGenerator):
    """Decoders with transformers' own generate(): requests with and without media share a batch."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._positions = learnt_positions(pipe.model.get_decoder(), pipe.model)

    def example(self, size: int) -> Any:
        """A chat. A small one has words alone, a larger one a picture too, so the proof covers both in one batch."""
        return example_prompt(self.pipe, size)

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The model's inputs. Empty if the media of these units do not fit into one tensor; `run` then splits the batch."""
        return super().collate(units) if len(_stackable(units)) == 1 else {}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For each unit its sequences, each a list of new tokens, or why it has none."""
        if inputs:
            return super().run(inputs, units, progress)
        outputs: dict[int, Any] = {}
        for indices in _stackable(units):
            group = [units[index] for index in indices]
            outputs.update(zip(indices, super().run(self.collate(group), group, progress), strict=True))
        return [outputs[index] for index in range(len(units))]

    def finish(self, assembly: Assembly) -> Any:
        """`[{"input_text": …, "generated_text": …}]`, one for each sequence; the repeated input leaves out media."""
        request: Request = assembly.context
        records: list[Any] = []
        for tokens in filled(assembly.outputs[0], request, self.hidden):
            sequence = torch.cat([request.ids, torch.tensor(tokens, dtype=torch.long)])
            records += _records(self.copies.get(), sequence[None], request.ids[None], request.prompt, request.arguments)
        return records

    def _nested(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return _as_called(parameters)

    def _generation(self, arguments: Arguments) -> Mapping[str, Any]:
        return _generate_kwargs(arguments)

    def _read(self, value: Any, arguments: Arguments) -> tuple[Any, torch.Tensor, Any]:
        require_prompt(self, value, self._longest_prompt)
        features, prompt = read_prompt(self.copies.get(), value, arguments)
        return prompt, features["input_ids"][0].long(), features

    def _shape(self, features: Any) -> Any:
        return shape_key(features)

    def _inputs(self, units: Sequence[Unit]) -> dict[str, Any]:
        inputs = super()._inputs(units)
        rows = [unit.features for unit in units]
        for name in dict.fromkeys(name for row in rows for name in row if name != "input_ids"):
            if name in _PER_TOKEN:
                inputs[name] = _left_padded([row.get(name) for row in rows], inputs["input_ids"])
            else:
                inputs[name] = _one_after_the_other([row[name] for row in rows if name in row])
        return inputs


class EqualMultimodal(EqualWriter):
    """Encoder-decoders, and models with a generate() of their own, such as BLIP and Florence: equal shapes only."""

    def parse(self, parameters: Mapping[str, Any]) -> Arguments:
        """The pipeline's arguments."""
        return super().parse(_as_called(parameters))

    def generation(self, arguments: Arguments) -> Mapping[str, Any]:
        """The arguments of generate() of a request."""
        return _generate_kwargs(arguments)

    def read(self, value: Any, arguments: Arguments) -> tuple[dict[str, torch.Tensor], Any]:
        """The tensors of a prompt, and the prompt with its tokens for `finish`."""
        require_prompt(self, value, self._positions or context_length(self.pipe.model) or self.max_tokens)
        features, prompt = read_prompt(self.copies.get(), value, arguments)
        ids = features.get("input_ids", features.get("decoder_input_ids"))
        return features, (prompt, ids)

    def finish(self, assembly: Assembly) -> Any:
        """`[{"input_text": …, "generated_text": …}]`, one for each sequence; the repeated input leaves out media."""
        request: Writing = assembly.context
        prompt, ids = request.prompt
        return _records(self.copies.get(), assembly.outputs[0], ids, prompt, request.arguments)


def image_text_writer(pipe: Any) -> Adapter:
    """The adapter of image-text-to-text and any-to-any. Decoders with transformers' own generate() get the adapter that pads."""
    own = type(pipe.model).generate is not GenerationMixin.generate
    return EqualMultimodal(pipe) if own or pipe.model.config.is_encoder_decoder else MultimodalGenerator(pipe)


def read_prompt(pipe: Any, value: Any, arguments: Arguments) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a text, a chat, or a dict of text and media; and the prompt in the form for the pipeline's postprocess.

    Raises ItemError (bad_input) for a chat with media beside it and for an empty prompt.
    """
    if isinstance(value, Mapping):
        media = {name: _shown(value[name]) for name in _MEDIA if name in value}
        value = value["text"] if not media else {"text": value["text"], **media}
        if media and not isinstance(value["text"], str):
            raise ItemError("bad_input", "media of a chat stand inside its messages, not beside them", STAGE)
    if isinstance(value, list):
        chat = any_to_any.Chat if isinstance(pipe, AnyToAnyPipeline) else Chat
        value = chat([_shown_message(one) for one in value])
        last = value.messages[-1]
        if isinstance(last["content"], str) and _continues(value.messages, arguments):
            last["content"] = [{"type": "text", "text": last["content"]}]  # postprocess appends to the last part
    if value in ("", []):
        raise ItemError("bad_input", "the prompt is empty", STAGE)
    features = dict(pipe.preprocess(value, **arguments.fresh().preprocess))
    prompt = features.pop("text")
    _require_sound(pipe.model.config, features)
    if isinstance(prompt, list):  # some processors return the one text in a list
        (prompt,) = prompt
    return features, prompt


def require_prompt(adapter: Adapter, value: Any, longest: int) -> None:
    """Raise ItemError (too_long) for a text or a chat with more than `longest` tokens, before any medium is read."""
    text = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(text, str):
        adapter.long_texts().require(text, longest)
    elif isinstance(text, list):
        require_chat(adapter.pipe.processor, text, adapter.long_texts(), longest)


def _require_sound(config: Any, features: Mapping[str, Any]) -> None:
    """Raise ItemError for recordings of one token each, if the model recognises an expanded prompt by two tokens in a row.

    Qwen2Audio mistakes such a prompt for a prompt of an earlier release and fails, except beside a longer recording in its batch.
    """
    if config.model_type != "qwen2_audio" or "input_features" not in features:
        return
    sound = features["input_ids"] == config.audio_token_id
    if not (sound[:, :-1] & sound[:, 1:]).any():
        raise ItemError(
            "bad_input", "the recording is too short for this model; send a tenth of a second or more", STAGE
        )


def example_prompt(pipe: Any, size: int) -> Any:
    """A made-up prompt of about `size` words; from ten words on with a picture or a sound, where the model takes them."""
    source = random.Random(size)
    words = " ".join(source.choice(["the", "sea", "of", "trees", "was", "wide", "and", "old"]) for _ in range(size))
    part = _example_part(pipe, size) if size >= _WORDS_ALONE else None
    if getattr(pipe.processor, "chat_template", None) is not None:
        parts = [] if part is None else [part]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]
    if part is None or part["type"] != "image":
        return words
    return {"images": part["image"], "text": f"{getattr(pipe.processor, 'image_token', '')}{words}"}


def _example_part(pipe: Any, seed: int) -> dict[str, Any] | None:
    source, senses = np.random.default_rng(seed), getattr(pipe.model, "input_modalities", ())
    if "image" in senses:
        noise = source.integers(0, 255, (_EXAMPLE_PIXELS, _EXAMPLE_PIXELS, 3), dtype=np.uint8)
        return {"type": "image", "image": Image.fromarray(noise)}
    if "audio" in senses:
        return {"type": "audio", "audio": (0.1 * source.standard_normal(seed * _EXAMPLE_SAMPLES)).astype(np.float32)}
    return None


def _as_called(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the form that the pipeline reads: it knows one argument of generate() by its own name."""
    return nested(parameters, but=("max_new_tokens",))


def _generate_kwargs(arguments: Arguments) -> Mapping[str, Any]:
    found: Mapping[str, Any] = arguments.forward.get("generate_kwargs") or {}
    return found


def _continues(messages: Sequence[Mapping[str, Any]], arguments: Arguments) -> bool:
    final = arguments.preprocess.get("continue_final_message")
    return bool(messages[-1]["role"] == "assistant" if final is None else final)


def _shown_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [{name: _shown(one) for name, one in part.items()} for part in content]
    return {**message, "content": content}


def _shown(value: Any) -> Any:
    """A video as the frames that a model sees, `[frames, height, width, 3]`; any other value unchanged."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if not isinstance(value, Clip):
        return value
    count = value.count()
    wanted = sorted({round(place) for place in np.linspace(0, max(0, count - 1), min(count, VIDEO_FRAMES)).tolist()})
    return np.stack(value.frames(wanted))


def _records(pipe: Any, sequences: Any, ids: Any, prompt: Any, arguments: Arguments) -> list[Any]:
    outputs = {"generated_sequence": sequences, "input_ids": ids, "prompt_text": prompt}
    records = pipe.postprocess(outputs, **arguments.fresh().postprocess)
    return [{name: _without_media(value) for name, value in record.items()} for record in records]


def _without_media(value: Any) -> Any:
    """The messages of a chat, with each part of media reduced to its type; a text unchanged; tokens as a list."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    value = getattr(value, "messages", value)  # with tokens as result, the pipeline returns its own Chat object
    if not isinstance(value, list):
        return value
    return [{**message, "content": _named(message["content"])} for message in value]


def _named(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [part if part["type"] == "text" else {"type": part["type"]} for part in content]


def _stackable(units: Sequence[Unit]) -> list[list[int]]:
    """Positions of units, grouped so that the media of each group have equal shapes; units without media fit into any group."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for index, unit in enumerate(units):
        shapes = {name: _shape_of(value) for name, value in unit.features.items() if name not in _PER_TOKEN}
        shapes.pop("input_ids")
        for known, members in groups:
            if all(known.get(name, shape) == shape for name, shape in shapes.items()):
                known.update(shapes)
                members.append(index)
                break
        else:
            groups.append((shapes, [index]))
    return [members for _, members in groups]


def _shape_of(value: Any) -> Any:
    return (
        tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else object()
    )  # a list cannot be joined with others


def _one_after_the_other(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]


def _left_padded(rows: Sequence[torch.Tensor | None], ids: torch.Tensor) -> torch.Tensor:
    """`[rows, tokens, …]` with zeros before shorter rows and in place of missing rows."""
    found = next(row for row in rows if row is not None)
    padded = torch.zeros((len(rows), ids.shape[1], *found.shape[2:]), dtype=found.dtype)
    for index, row in enumerate(rows):
        if row is not None:
            padded[index, ids.shape[1] - row.shape[1] :] = row[0]
    return padded
