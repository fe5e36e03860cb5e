"""Adapters of text encoders: texts are tokenised in bulk, padded to the longest of their batch, and cut apart again.

Padding is exact here because the attention mask hides it from every other position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipefleet.contract import encode_json
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.arguments import STAGE, Arguments
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_PADDING = {"attention_mask": 0, "special_tokens_mask": 1}


class TextEncoder(Adapter):
    """Tokenises, pads and runs an encoder; what becomes of its outputs is for subclasses to say."""

    typical_size = 48

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.pads = True
        self._positions = position_limit(pipe.model)

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        """The units of each item, or why it has none; items with the same tokenizer arguments in one call."""
        prepared: list[list[Unit] | ItemError] = [[] for _ in decoded]
        groups: dict[str, list[int]] = defaultdict(list)
        parsed: dict[int, Arguments] = {}
        # The items of a job share one mapping of parameters: parsed once for all of them.
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
            fields = ",".join(sorted(one.value)) if isinstance(one.value, Mapping) else ""
            groups[fields + group].append(index)
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
        inputs = {}
        for name in units[0].features:
            rows = np.full((len(units), longest), padding.get(name, 0), dtype=np.int64)
            for row, unit in zip(rows, units, strict=True):
                start = longest - unit.length if left else 0
                row[start : start + unit.length] = unit.features[name]
            inputs[name] = torch.from_numpy(rows)
        return inputs

    def run(self, inputs: dict[str, Any], units: Sequence[Unit]) -> Any:
        """The model's outputs, still on the device."""
        device = self.pipe.device
        with torch.inference_mode():
            return self.pipe.model(**{name: tensor.to(device) for name, tensor in inputs.items()})

    def key(self, work_parameters: Mapping[str, Any]) -> Any:
        """What must be equal for two texts to share a forward, beyond their tensors."""
        return None

    def span(self, unit: Unit, longest: int) -> slice:
        """The positions of a unit's own tokens in a row of `longest`."""
        return slice(longest - unit.length, None) if self.pipe.tokenizer.padding_side == "left" else slice(unit.length)

    def _tokenise(
        self, decoded: Sequence[Decoded], parsed: Sequence[Arguments], indices: Sequence[int]
    ) -> list[tuple[int, list[Unit] | ItemError]]:
        try:
            encoded = self._encode([one.value for one in decoded], parsed[0])
        except Exception as error:  # noqa: BLE001 - told apart below: with one text it is that text's own failure
            if len(decoded) == 1:
                return [(indices[0], ItemError("bad_input", f"the tokenizer refuses the input: {brief(error)}", STAGE))]
            alone = zip(decoded, parsed, indices, strict=True)
            return [pair for one, args, index in alone for pair in self._tokenise([one], [args], [index])]
        names = list(encoded)
        return [
            (index, self._units(one, args, {name: encoded[name][row] for name in names}))
            for row, (one, args, index) in enumerate(zip(decoded, parsed, indices, strict=True))
        ]

    def _encode(self, values: list[Any], arguments: Arguments) -> Mapping[str, Any]:
        tokenizer = self.copies.get().tokenizer
        keywords = dict(arguments.fresh().preprocess)
        if not isinstance(values[0], Mapping):
            return dict(tokenizer(values, **keywords))
        columns = {name: [value[name] for value in values] for name in values[0]}
        return dict(tokenizer(**columns, **keywords))

    def _units(self, decoded: Decoded, arguments: Arguments, features: dict[str, Any]) -> list[Unit] | ItemError:
        length = len(features["input_ids"])
        if self._positions is not None and length > self._positions:
            # Refused here: on a GPU an index beyond the table breaks the device for every later input.
            text = f"the text has {length} tokens, the model takes {self._positions}; pass truncation=true to cut it"
            return ItemError("too_long", text, STAGE)
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        alike = None if self.pads else length
        key = (self.key(decoded.work.parameters), arguments.forward_key, tuple(features), alike)
        return [Unit(assembly, 0, key, length, features)]


def position_limit(model: torch.nn.Module) -> int | None:
    """How many positions the model's learnt position embeddings have; None where positions are computed."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe")
    ]
    # RoBERTa and its kin count positions from behind the padding's.
    return min((one.num_embeddings - (one.padding_idx + 1 if one.padding_idx else 0) for one in tables), default=None)


class FeatureExtractor(TextEncoder):
    """feature-extraction: one vector a token, or one a text with `pooling`, pooled on the device."""

    def key(self, work_parameters: Mapping[str, Any]) -> Any:
        """Pooled and unpooled texts take different ways on the device."""
        return work_parameters.get("pooling"), bool(work_parameters.get("normalize", False))

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """A float32 array for each unit: `[width]` with pooling, `[1, tokens, width]` without, its own tokens only."""
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
        """`[units, width]`: the mean over a unit's tokens, its first or its last token."""
        spans = [self.span(unit, hidden.shape[1]) for unit in units]
        first = torch.tensor([span.start or 0 for span in spans], device=hidden.device)
        lengths = torch.tensor([unit.length for unit in units], device=hidden.device)
        if pooling == "mean":
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            own = (positions >= first[:, None]) & (positions < (first + lengths)[:, None])
            return (hidden * own[:, :, None]).sum(1) / lengths[:, None]
        chosen = first if pooling == "cls" else first + lengths - 1
        return hidden[torch.arange(len(units), device=hidden.device), chosen]


class TextClassifier(TextEncoder):
    """text-classification: scores of labels for a text or a pair of texts."""

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The logits of each unit, `[1, labels]`."""
        logits = outputs["logits"].float().cpu()
        return [{"logits": logits[index : index + 1]} for index in range(len(units))]

    def finish(self, assembly: Assembly) -> Any:
        """`[{label, score}]` for a text, as the pipeline returns it for a single one; a dict for a pair without top_k."""
        result = super().finish(assembly)
        single = isinstance(assembly.work.item.inputs, Mapping) and "text" in assembly.work.item.inputs
        return result if isinstance(result, list) or single else [result]
