"""Adapters of text encoders: texts are tokenised in bulk, padded to the longest text of their batch, and cut apart again.

Padding is exact here, because the attention mask hides it from every other position. Subclasses (one for each task) make units in
`units` and results in `split` and `finish`. Texts that are too long raise ItemError (too_long).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipefleet.contract.messages import encode_json
from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.adapters.text.buckets import rounded_length
from pipefleet_workers.adapters.text.long_texts import LONG, is_long
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit
from pipefleet_workers.process.watchdog import working_on

_PADDING = {"attention_mask": 0, "special_tokens_mask": 1}
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")
_TO_LENGTH = "max_length"
_SIGMOID, _SOFTMAX, _NONE = "sigmoid", "softmax", "none"


class TextEncoder(Adapter):
    """Tokenises, pads and runs an encoder; subclasses turn its outputs into results."""

    typical_size = 48
    cut_hint = "pass truncation=true to cut it"
    """Advice for a text with more tokens than the model has positions."""
    rounds_lengths = False
    """Whether batches are padded to one of few lengths, for a compiled model. As exact as all padding, see `pads`."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = True
        self._positions = position_limit(pipe.model)
        # Classifiers that are decoders would otherwise return a cache that no code reads.
        cached = "use_cache" in inspect.signature(pipe.model.forward).parameters
        self._switches = {"use_cache": False} if cached else {}

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        """The units or the failure of each item; items with the same tokenizer arguments share one call."""
        prepared: list[list[Unit] | ItemError] = [[] for _ in decoded]
        groups: dict[str, list[int]] = defaultdict(list)
        parsed: dict[int, Arguments] = {}
        # The items of a job share one mapping of parameters, so it is parsed once for all of them.
        known: dict[int, tuple[Arguments, str]] = {}
        for index, one in enumerate(decoded):
            shared = id(one.work.parameters)
            try:
                if shared not in known:
                    arguments = self.parse(one.work.parameters)
                    known[shared] = arguments, encode_json(sorted(arguments.preprocess.items()))
            except ItemError as error:
                prepared[index] = error
                continue
            parsed[index], group = known[shared]
            if isinstance(one.value, str) and len(one.value) <= LONG:
                groups[group].append(index)
                continue
            fields = ",".join(sorted(one.value)) if isinstance(one.value, Mapping) else ""
            alone = str(index) if is_long(one.value) else ""  # a call holds the tokens of all its texts in memory
            groups[alone + fields + group].append(index)
        for indices in groups.values():
            for index, result in self._tokenise([decoded[i] for i in indices], [parsed[i] for i in indices], indices):
                prepared[index] = result
        return prepared

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Input tensors padded to the longest unit on the tokenizer's own side."""
        tokenizer = self.pipe.tokenizer
        left = tokenizer.padding_side == "left"
        padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id, **_PADDING}
        longest = max(unit.length for unit in units)
        if self.rounds_lengths and self.pads:
            longest = rounded_length(longest, self._positions)
        lengths = np.array([unit.length for unit in units])
        places = np.arange(longest)
        own = places >= longest - lengths[:, None] if left else places < lengths[:, None]
        inputs = {}
        for name in units[0].features:
            rows = np.full(own.shape, padding.get(name, 0), dtype=np.int64)
            rows[own] = _joined([unit.features[name] for unit in units], lengths)
            inputs[name] = torch.from_numpy(rows)
        return inputs

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The model's outputs, still on the device."""
        device = self.pipe.device
        with torch.inference_mode():
            return self.pipe.model(**{name: tensor.to(device) for name, tensor in inputs.items()}, **self._switches)

    def key(self, work_parameters: Mapping[str, Any]) -> Any:
        """The task's own part of the batch key: only texts with equal keys share a forward."""
        return None

    def span(self, unit: Unit, longest: int) -> slice:
        """The positions of a unit's own tokens in a row of length `longest`."""
        return slice(longest - unit.length, None) if self.pipe.tokenizer.padding_side == "left" else slice(unit.length)

    def encode(self, values: Sequence[Any], arguments: Arguments) -> Sequence[Any]:
        """The tokens of each value, for `units`. One bad value may raise an error for all values.

        The values share only the preprocess part of `arguments`.
        """
        tokenizer, keywords = self.copies.get().tokenizer, self.keywords(arguments)
        if all([isinstance(value, str) for value in values]):
            return self.copies.slices().encode(values, keywords)
        if isinstance(values[0], Mapping):
            encoded = tokenizer(**{name: [value[name] for value in values] for name in values[0]}, **keywords)
        else:
            encoded = tokenizer(list(values), **keywords)
        names = list(encoded)
        return [dict(zip(names, row, strict=True)) for row in zip(*[encoded[name] for name in names], strict=True)]

    def keywords(self, arguments: Arguments) -> dict[str, Any]:
        """The tokenizer's arguments, without padding: texts are padded to their batch, not to their job."""
        return {name: value for name, value in arguments.fresh().preprocess.items() if name != "padding"}

    def bounded(self, value: Any, arguments: Arguments) -> Any:
        """The value without the end of a long text that the tokenizer would cut off. Raises ItemError (too_long)."""
        longest = self.longest(self._positions)
        return self.long_texts().bounded(value, self.keywords(arguments), longest, self.cut_hint)

    def units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit]:
        """The units of one item. Raises ItemError (too_long)."""
        return [self.unit(Assembly(decoded.work, expected=1, context=arguments), 0, encoded, arguments)]

    def unit(self, assembly: Assembly, index: int, features: Mapping[str, Any], arguments: Arguments) -> Unit:
        """A unit with a list of numbers for each input of the model, or a number for a list of it. Raises ItemError (too_long)."""
        length = len(features["input_ids"])
        longest = self.longest(self._positions)
        if length > longest:
            # It must be refused here: on a GPU an index beyond the table breaks the device for every later input.
            text = f"the text has {length} tokens, the model takes {longest}; {self.cut_hint}"
            raise ItemError("too_long", text, STAGE)
        alike = None if self.pads else length
        key = (self.key(assembly.work.parameters), arguments.forward_key, tuple(features), alike)
        return Unit(assembly, index, key, length, features)

    def _tokenise(
        self, decoded: Sequence[Decoded], parsed: Sequence[Arguments], indices: Sequence[int]
    ) -> list[tuple[int, list[Unit] | ItemError]]:
        try:
            values = [one.value for one in decoded]
            if len(decoded) == 1 and is_long(values[0]):
                working_on(decoded[0].work)
                values = [self.bounded(values[0], parsed[0])]
            encoded = self.encode(values, parsed[0])
        except Exception as error:  # noqa: BLE001 - handled below: with a single text, the error is the failure of this text
            if len(decoded) == 1:
                return [(indices[0], _refusal(error))]
            alone = zip(decoded, parsed, indices, strict=True)
            return [pair for one, args, index in alone for pair in self._tokenise([one], [args], [index])]
        rows = zip(decoded, parsed, indices, encoded, strict=True)
        return [(index, self._units(one, args, own)) for one, args, index, own in rows]

    def _units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit] | ItemError:
        try:
            return self.units(decoded, arguments, encoded)
        except ItemError as error:
            return error


def _refusal(error: Exception) -> ItemError:
    if isinstance(error, ItemError):
        return error
    return ItemError("bad_input", f"the tokenizer refuses the input: {brief(error)}", STAGE)


def _joined(rows: Sequence[Any], lengths: np.ndarray[Any, Any]) -> Any:
    """The numbers of all rows behind each other; a number alone if it is all of them. A row of one number may be given as that."""
    kinds = {type(row) for row in rows}
    if kinds == {int}:
        return rows[0] if rows.count(rows[0]) == len(rows) else np.repeat(rows, lengths)
    if int in kinds:
        rows = [[row] * n if type(row) is int else row for row, n in zip(rows, lengths.tolist(), strict=True)]
    if kinds <= {int, list}:
        return np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return np.concatenate(rows)


def position_limit(model: torch.nn.Module) -> int | None:
    """How many positions the model's learnt position embeddings have; None if positions are computed."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES
    ]
    return min((one.num_embeddings - _unused_positions(one) for one in tables), default=None)


def _unused_positions(table: Any) -> int:
    """Positions at the start of a table that no text uses.

    RoBERTa and its kin count from the position after the padding token's index. BART and its kin have an attribute `offset`.
    """
    offset: int | None = getattr(table, "offset", None)
    if offset is not None:
        return offset
    return table.padding_idx + 1 if table.padding_idx else 0


class FeatureExtractor(TextEncoder):
    """feature-extraction: one vector for each token, or one for each text with `pooling`, pooled on the device."""

    def encode(self, values: Sequence[Any], arguments: Arguments) -> Sequence[Any]:
        """The tokens of each value. Raises ItemError (too_long) if padding would go beyond the model's positions."""
        asked = self.keywords(arguments)
        if asked.get("padding") == _TO_LENGTH:
            length = asked.get("max_length") or self.pipe.tokenizer.model_max_length
            longest = self.longest(self._positions)
            if length > longest:
                text = (
                    f"padding to max_length makes {length} tokens, the model takes {longest}; pass a lower max_length"
                )
                raise ItemError("too_long", text, STAGE)
        return super().encode(values, arguments)

    def keywords(self, arguments: Arguments) -> dict[str, Any]:
        """The tokenizer's arguments. An asked padding to one length stays: the result has vectors for padding tokens too."""
        padding = arguments.fresh().preprocess.get("padding")
        return {**super().keywords(arguments), **({"padding": padding} if padding == _TO_LENGTH else {})}

    def units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit]:
        """The units of one item. With `pooling`, padding is removed: the vector is made of the text's own tokens."""
        if decoded.work.parameters.get("pooling") is not None:
            encoded = _unpadded(encoded)
        return super().units(decoded, arguments, encoded)

    def key(self, work_parameters: Mapping[str, Any]) -> Any:
        """Pooled and unpooled texts need different work on the device."""
        return work_parameters.get("pooling"), bool(work_parameters.get("normalize", False))

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """A float32 array for each unit: `[width]` with pooling; without pooling `[1, tokens, width]` of its own tokens only."""
        pooling, normalize = units[0].key[0]
        with torch.inference_mode():
            hidden = outputs[0].float()
            if pooling is not None:
                hidden = self._pooled(hidden, units, pooling)
            if normalize:
                hidden = torch.nn.functional.normalize(hidden, dim=-1)
            rows = hidden.cpu().numpy()
        if pooling is not None:
            return list(rows)
        return [rows[index : index + 1, self.span(unit, rows.shape[1])].copy() for index, unit in enumerate(units)]

    def finish(self, assembly: Assembly) -> Any:
        """The array itself; it is written as nested lists of numbers."""
        return assembly.outputs[0]

    def _pooled(self, hidden: torch.Tensor, units: Sequence[Unit], pooling: str) -> torch.Tensor:
        """`[units, width]`: the mean over a unit's tokens, or its first or last token."""
        spans = [self.span(unit, hidden.shape[1]) for unit in units]
        first = torch.tensor([span.start or 0 for span in spans], device=hidden.device)
        lengths = torch.tensor([unit.length for unit in units], device=hidden.device)
        if pooling == "mean":
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            own = (positions >= first[:, None]) & (positions < (first + lengths)[:, None])
            return (hidden * own[:, :, None]).sum(1) / lengths[:, None]
        chosen = first if pooling == "cls" else first + lengths - 1
        return hidden[torch.arange(len(units), device=hidden.device), chosen]


def _unpadded(encoded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The features of a text's own tokens."""
    mask = encoded.get("attention_mask", ())
    if isinstance(mask, int) or all(mask):
        return encoded
    return {name: [one for one, own in zip(row, mask, strict=True) if own] for name, row in encoded.items()}


class TextClassifier(TextEncoder):
    """text-classification: scores of labels for a text or a pair of texts, ranked for a whole batch on the device."""

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """For each unit its scores and the indices of its labels, the highest score first, as many as its `top_k` asks for."""
        asked = [self.arguments(unit) for unit in units]
        wanted = {id(one): self._wanted(one) for one in {id(one): one for one in asked}.values()}
        most: dict[str, int] = defaultdict(int)
        for function, count in wanted.values():
            most[function] = max(most[function], count)
        with torch.inference_mode():
            logits = outputs["logits"].float()
            ranked = {function: _ranked(logits, function, count) for function, count in most.items()}
        rows = []
        for row, one in enumerate(asked):
            function, count = wanted[id(one)]
            scores, labels = ranked[function]
            rows.append((scores[row][:count], labels[row][:count]))
        return rows

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """The logits of each unit."""
        return list(self.run(self.collate(units), units, UNOBSERVED)["logits"].float().cpu().numpy())

    def finish(self, assembly: Assembly) -> Any:
        """`[{label, score}]` for a text, as the pipeline returns it for a single text; a dict for a pair without top_k."""
        names, inputs = self._names, assembly.work.item.inputs
        scores, labels = assembly.outputs[0]
        records = [{"label": names[label], "score": score} for score, label in zip(scores, labels, strict=True)]
        pair = not isinstance(inputs, str) and isinstance(inputs, Mapping) and "text" in inputs
        return records[0] if pair and assembly.context.postprocess.get("_legacy", True) else records

    @functools.cached_property
    def _names(self) -> Mapping[int, str]:
        """The labels; a config looks each attribute up slowly."""
        names: Mapping[int, str] = self.pipe.model.config.id2label
        return names

    def _wanted(self, arguments: Arguments) -> tuple[str, int]:
        """The function to apply and how many labels to keep."""
        post, config = arguments.postprocess, self.pipe.model.config
        function = post.get("function_to_apply") or default_function(config)
        count = post.get("top_k", 1)
        return str(getattr(function, "value", function)), config.num_labels if count is None else count


def default_function(config: Any) -> str:
    """The function that transformers applies to the logits of a classifier by default."""
    problem, labels = config.problem_type, config.num_labels
    if problem == "regression":
        return _NONE
    if problem == "multi_label_classification" or labels == 1:
        return _SIGMOID
    if problem == "single_label_classification" or labels > 1:
        return _SOFTMAX
    own = getattr(config, "function_to_apply", None) or _NONE
    return str(getattr(own, "value", own))


def _ranked(logits: torch.Tensor, function: str, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """The `count` highest scores of each row, and their positions; equal scores in the order of the labels."""
    if function == _SOFTMAX:
        logits = logits.softmax(-1)
    elif function == _SIGMOID:
        logits = logits.sigmoid()
    scores, labels = logits.sort(dim=-1, descending=True, stable=True)
    return scores[:, :count].tolist(), labels[:, :count].tolist()
