"""Whisper's generate() for a batch, with each row's result as if it ran alone. `speech` puts it in front of the model.

transformers fills shorter rows with padding and then reads the filled rows. So the attention that times the words is normalised
over padding too; a row that is decoded again at a higher temperature gets another row's bounds; all rows share one generator.
`WhisperRows` cuts each row to its own tokens, decodes it again by itself, and draws from the row's own seed. It keeps only the
attention that times the words: the whole attention takes 3 GB for half a minute with the largest model.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from pipefleet_workers.adapters.draws import Draws
from pipefleet_workers.adapters.writing.leaving import LeavingRows

_Decoded = tuple[list[Any], list[Any], list[bool], list[bool], Any]
"""The result of generate_with_fallback(): by row the tokens, the outputs, and whether it is silent; then batch data."""


class _Call(threading.local):
    """Data of the call of generate() that runs in a thread; each thread has its own."""

    def __init__(self) -> None:
        self.languages: list[torch.Tensor | None] | None = None
        """The languages of the last generate(); its outputs themselves are not kept."""
        self.ends: Sequence[int] = ()
        self.falls_back: dict[int, bool] = {}
        self.draws: list[Draws] = []


class WhisperRows:
    """Stands in front of the generation of one Whisper model, from its creation on. Thread-safe, but for two kinds of calls.

    Calls that time words switch the attention of the whole model, and calls that draw use torch's own generator. While one of
    these runs, no other call may run.
    """

    def __init__(self, model: Any) -> None:
        """Replace four methods of this one `model` object, and reduce the attention that its forward returns."""
        self._model = model
        self._call = _Call()
        self._attention = model.config._attn_implementation
        self._heads = _AlignmentHeads(model)
        self._generate: Callable[..., Any] = model.generate
        self._decode: Callable[..., _Decoded] = model.generate_with_fallback
        self._moments: Callable[..., torch.Tensor] = model._extract_token_timestamps
        self._needs: Callable[..., tuple[bool, bool]] = model._need_fallback
        model.generate = self._generate_once
        model.generate_with_fallback = self._decode_rows
        model._extract_token_timestamps = self._moments_of_rows
        model._need_fallback = self._note_fallback

    def seed(self, seeds: Sequence[int]) -> None:
        """Seed each row of the next generate(): it draws as if torch were seeded and the pipeline called with this row alone."""
        self._call.draws = [Draws(seed, self._model.device, loads=True) for seed in seeds]

    def languages(self, rows: int) -> list[torch.Tensor | None]:
        """The language token of each row of the last generate(), `[1]`.

        None for a row without returned segments or without a language.
        """
        return self._call.languages or [None] * rows

    def _generate_once(self, *arguments: Any, **named: Any) -> Any:
        """Call generate(), then undo its switch to eager attention, which timed words cause: every call begins alike."""
        self._call.languages = None
        try:
            generated = _with_silent_rows(self._generate(*arguments, **named))
        finally:
            if self._model.config._attn_implementation != self._attention:
                self._model.config._attn_implementation = self._attention
            self._call.draws = []
        if isinstance(generated, Mapping) and "segments" in generated:
            known = set((getattr(self._model.generation_config, "lang_to_id", None) or {}).values())
            self._call.languages = [_language(segments, known) for segments in generated["segments"]]
        return generated

    def _decode_rows(self, **call: Any) -> _Decoded:
        """One step through the recordings: all rows at the first temperature, then one by one the rows that need another."""
        rows, temperatures = call["cur_bsz"], call["temperatures"]
        self._call.ends = _ids(call["generation_config"].eos_token_id)
        if rows == 1:
            return self._decode_alone(call, 0, temperatures)
        if temperatures[0]:
            again, left = list(range(rows)), temperatures
            sequences, outputs, skipped, kind = [None] * rows, [None] * rows, [False] * rows, None
        else:
            self._call.falls_back = {}
            sequences, outputs, skipped, _, kind = self._decode_together({**call, "temperatures": temperatures[:1]})
            for output in outputs:
                _let_go(output)
            left = temperatures[1:]
            again = [row for row in range(rows) if self._call.falls_back.get(row)] if left else []
        for row in again:
            (sequences[row],), (outputs[row],), (skipped[row],), _, kind = self._decode_alone(call, row, left)
        return sequences, outputs, skipped, call["do_condition_on_prev_tokens"], kind

    def _decode_together(self, call: Mapping[str, Any]) -> _Decoded:
        """Decode all rows; on a CPU, rows that have ended leave the batch."""
        config = call["generation_config"]
        if not LeavingRows.possible(self._model, call["cur_bsz"], lambda name: getattr(config, name, None)):
            return self._decode(**call)
        with LeavingRows(self._model, self._call.ends) as leaving:
            criteria = StoppingCriteriaList([*(call["stopping_criteria"] or ()), leaving])
            return self._decode(**{**call, "stopping_criteria": criteria})

    def _decode_alone(self, call: Mapping[str, Any], row: int, temperatures: Sequence[float | None]) -> _Decoded:
        place = call["batch_idx_map"][row]
        mine: dict[str, Any] = {**call, "temperatures": temperatures}
        if call["cur_bsz"] > 1:
            mask = call["attention_mask"]
            mine |= {
                "segment_input": call["segment_input"][row : row + 1],
                "decoder_input_ids": call["decoder_input_ids"][row : row + 1],
                "attention_mask": None if mask is None else mask[place : place + 1],
                "generation_config": copy.deepcopy(call["generation_config"]),
                "batch_idx_map": [place],
                "do_condition_on_prev_tokens": [False],  # recordings with such conditioning run alone
                "cur_bsz": 1,
                "batch_size": 1,
            }
        with self._call.draws[place].current() if self._call.draws and any(temperatures) else contextlib.nullcontext():
            found: _Decoded = self._decode(**mine)
        for output in found[1]:
            _let_go(output)
        return found

    def _note_fallback(self, sequence: Any, outputs: Any, index: int, *rest: Any) -> tuple[bool, bool]:
        found = self._needs(sequence, outputs, index, *rest)
        self._call.falls_back[index] = found[0]
        return found

    def _moments_of_rows(
        self,
        generate_outputs: Any,
        alignment_heads: Any,
        time_precision: float = 0.02,
        num_frames: Any = None,
        num_input_ids: int | None = None,
    ) -> torch.Tensor:
        """When each token was spoken, in seconds, computed for each row from its own tokens.

        Shorter rows repeat their last moment.
        """
        count = generate_outputs.sequences.shape[0]
        alignment_heads = self._heads.places(alignment_heads)
        if count == 1:
            return self._moments(generate_outputs, alignment_heads, time_precision, num_frames, num_input_ids)
        rows = []
        for row in range(count):
            own = num_frames if num_frames is None or isinstance(num_frames, int) else num_frames[row : row + 1]
            output = _row_of(generate_outputs, row, num_input_ids or 0, self._call.ends)
            rows.append(self._moments(output, alignment_heads, time_precision, own, num_input_ids)[0])
        longest = max(len(one) for one in rows)
        return torch.stack([F.pad(one, (0, longest - len(one)), value=float(one[-1])) for one in rows])


class _AlignmentHeads:
    """Reduces the attention that a model's forward returns to the alignment heads: only they tell when a word was spoken."""

    def __init__(self, model: Any) -> None:
        """Reduce the attention of `model` from now on. Does nothing for a model without alignment heads: it cannot time words."""
        self._kept: list[list[int]] = [[] for _ in range(model.config.decoder_layers)]
        for layer, head in getattr(model.generation_config, "alignment_heads", None) or ():
            self._kept[layer].append(head)
        self._indices = [torch.tensor(heads, dtype=torch.long, device=model.device) for heads in self._kept]
        if any(self._kept):
            model.get_encoder().register_forward_pre_hook(_without_attention, with_kwargs=True)
            model.register_forward_hook(self._narrow)

    def places(self, heads: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """For each of `heads` (layer, head) its layer and its position among the kept heads of this layer."""
        return [(layer, self._kept[layer].index(head)) for layer, head in heads]

    def _narrow(self, model: Any, arguments: Any, output: Any) -> None:
        if getattr(output, "cross_attentions", None) is None:
            return
        layers = zip(output.cross_attentions, self._indices, strict=True)
        output["cross_attentions"] = tuple(layer.index_select(1, heads) for layer, heads in layers)
        output["decoder_attentions"] = ()


def _without_attention(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {**named, "output_attentions": False}


def _let_go(output: Any) -> None:
    """Delete the attention from a row's outputs. Otherwise a long recording keeps the attention of every half minute to the end."""
    if isinstance(output, dict):
        for name in [name for name in output if name.endswith("_attentions")]:
            del output[name]


def timed(model: Any, frames: Sequence[int], lengths: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """For each row i the seconds of `lengths[i]` different tokens, which the model writes for `frames[i]` frames.

    The model reads made-up states of its encoder. From noise it would time every word at the end of the recording.
    """
    states, mask = [], torch.zeros(len(frames), 2 * model.config.max_source_positions, dtype=torch.long)
    for row, count in enumerate(frames):
        mask[row, :count] = 1
        source = np.random.default_rng(count)
        states.append(source.standard_normal((model.config.max_source_positions, model.config.d_model)))
    (end, *_) = _ids(model.generation_config.eos_token_id)
    found = model.generate(
        encoder_outputs=BaseModelOutput(torch.tensor(np.stack(states)).to(model.device, model.dtype)),
        attention_mask=mask.to(model.device),
        return_timestamps=True,
        return_token_timestamps=True,
        force_unique_generate_call=True,
        num_beams=1,
        logits_processor=[_EndsAt(lengths, end)],
    )
    rows = zip(found["token_timestamps"].float().cpu().numpy(), found["sequences"].tolist(), strict=True)
    return [moments[: tokens.index(end)] for moments, tokens in rows]


class _EndsAt(LogitsProcessor):  # type: ignore[misc]
    """Ends each row after its own number of tokens, and lets it write no token twice. For one call."""

    def __init__(self, lengths: Sequence[int], end: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._end = end
        self._written = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores that allow only the end, or all tokens but the end."""
        ended = self._lengths.to(scores.device) <= self._written
        self._written += 1
        scores = scores.scatter(1, input_ids, -torch.inf)
        scores[ended] = -torch.inf
        scores[:, self._end] = torch.where(ended, 0.0, -torch.inf)
        return scores


class _Output(dict[str, Any]):
    """One row's outputs, with attributes like generate()'s outputs."""

    __getattr__ = dict.__getitem__


def _row_of(outputs: Any, row: int, prompt: int, ends: Sequence[int]) -> _Output:
    """The outputs that generate() would have returned for `row` alone: no steps after its end, only its own beams."""
    sequence = outputs.sequences[row : row + 1]
    beams = outputs.cross_attentions[0][0].shape[0] // outputs.sequences.shape[0]
    mine = slice(row * beams, (row + 1) * beams)
    steps = outputs.cross_attentions
    found = _Output()
    if "beam_indices" in outputs:  # beam indices already show the length of the row
        indices = outputs.beam_indices[row : row + 1]
        found["beam_indices"] = torch.where(indices < 0, indices, indices - row * beams)
    else:
        written = sequence[0, prompt:].tolist()
        end = next((place + 1 for place, token in enumerate(written) if token in ends), len(written))
        sequence, steps = sequence[:, : prompt + end], steps[:end]
    found["sequences"] = sequence
    found["cross_attentions"] = tuple(tuple(layer[mine] for layer in step) for step in steps)
    return found


def _with_silent_rows(generated: Any) -> Any:
    """The results, made readable for the pipeline where a row is empty because no one speaks in it.

    An empty row turns the tokens of all rows into floats, and has no segments.
    """
    if isinstance(generated, torch.Tensor):
        return generated.long()
    if "sequences" in generated:
        generated["sequences"] = generated["sequences"].long()
    if "segments" in generated:
        nothing = {"token_timestamps": torch.zeros(0), "result": torch.zeros(0, dtype=torch.long)}
        generated["segments"] = [one or [nothing] for one in generated["segments"]]
    return generated


def _language(segments: Sequence[Mapping[str, Any]], known: set[int]) -> torch.Tensor | None:
    """The language of a row: the first known language token in the result of its first segment; None without such a token."""
    result = segments[0]["result"]
    tokens = result["sequences"] if isinstance(result, Mapping) else result
    found = next((token for token in tokens.tolist() if token in known), None)
    return None if found is None else torch.tensor([found])


def _ids(value: int | Sequence[int] | torch.Tensor | None) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return [value] if isinstance(value, int) else list(value)
