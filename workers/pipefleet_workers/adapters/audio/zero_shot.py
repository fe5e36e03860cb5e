"""The adapter of zero-shot-audio-classification: the sounds of a batch in one call, the labels of all its requests in another.

Requests in a batch may have different labels: each sound is compared with the embeddings of its own labels. Embeddings of texts
are kept, since the items of a run share their labels.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipefleet.errors import UsageError
from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.adapters.audio.waveforms import SAMPLES_PER_FRAME
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import position_limit
from pipefleet_workers.adapters.text.whole_texts import require_labels
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

TEMPLATE = "This is a sound of {}."
"""transformers' own template, for a request without one."""
KEPT_TEXTS = 8192
"""Most embeddings of texts that are kept."""
TEXTS_AT_ONCE = 128
Tokens = tuple[int, ...]
_CROPPING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Features:
    """One recording and its labels: `sound` as the feature extractor makes it, `texts` as tokens."""

    sound: dict[str, torch.Tensor]
    texts: list[Tokens]


class ZeroShotAudio(Adapter):
    """Scores of the labels of the request. For models with a tower for sounds and a tower for texts, such as CLAP."""

    def __init__(self, pipe: Any) -> None:
        """Raise UsageError for a model without the two towers."""
        super().__init__(pipe)
        if not hasattr(pipe.model, "get_audio_features") or not hasattr(pipe.model, "logit_scale_a"):
            name = type(pipe.model).__name__
            raise UsageError(
                f"zero-shot-audio-classification needs a model that compares sounds with texts, not {name}"
            )
        self._positions = position_limit(pipe.model.text_model)
        self._known: OrderedDict[Tokens, torch.Tensor] = OrderedDict()
        self.parallel = False  # a forward changes what is known

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The stacked sounds; `run` pads the texts when it needs them."""
        names = units[0].features.sound
        return {name: torch.cat([unit.features.sound[name] for unit in units]) for name in names}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For each unit the logits of its labels, `[labels]`, on the host."""
        model, device = self.pipe.model, self.pipe.device
        with torch.inference_mode():
            sounds = model.get_audio_features(**{name: one.to(device) for name, one in inputs.items()}).pooler_output
            texts = self._embedded({tokens for unit in units for tokens in unit.features.texts})
            scale = model.logit_scale_a.exp()
            rows = [torch.stack([texts[tokens] for tokens in unit.features.texts]) for unit in units]
            return [(own @ sound * scale).cpu() for own, sound in zip(rows, sounds, strict=True)]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs themselves: `run` has split them already."""
        return list(outputs)

    def finish(self, assembly: Assembly) -> Any:
        """`[{score, label}]`, the best first."""
        labels, logits = assembly.context, assembly.outputs[0]
        return self.copies.get().postprocess({"candidate_labels": list(labels), "logits": logits[None]})

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        asked = self.parse(decoded.work.parameters).preprocess
        labels = _labels(asked.get("candidate_labels"))
        texts = self._tokens(labels, asked.get("hypothesis_template") or TEMPLATE)
        sound = self._heard(decoded.value)
        assembly = Assembly(decoded.work, expected=1, context=labels)
        length = max(1, self.pipe.feature_extractor.nb_max_samples // SAMPLES_PER_FRAME)
        return [Unit(assembly, 0, shape_key(sound), length, Features(sound, texts))]

    def _tokens(self, labels: Sequence[Any], template: str) -> list[Tokens]:
        # Not str.format: it would read attributes that a template names.
        require_labels([str(label) for label in labels], self.max_whole_characters)
        texts = [template.replace("{}", str(label)) for label in labels]
        if self._positions is not None:
            for text in texts:
                self.long_texts().require(text, self._positions)
        encoded = self.copies.get().tokenizer(texts)["input_ids"]
        longest = max(len(tokens) for tokens in encoded)
        if self._positions is not None and longest > self._positions:
            text = f"a label has {longest} tokens with its template, the model takes {self._positions}"
            raise ItemError("too_long", text, STAGE)
        return [tuple(tokens) for tokens in encoded]

    def _heard(self, samples: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        pipe = self.copies.get()
        extractor = pipe.feature_extractor
        long = len(samples) > extractor.nb_max_samples
        seconds = len(samples) / extractor.sampling_rate
        if (
            extractor.truncation == "fusion" and seconds > self.max_whole_seconds
        ):  # this extractor computes the whole recording and keeps a part
            text = f"the recording lasts {seconds:.0f} s, the model hears at most {self.max_whole_seconds:.0f} s of one"
            raise ItemError("too_long", f"{text} (PIPEFLEET_WORKER_MAX_WHOLE_SECONDS); send a part of it", STAGE)
        with cropped_by_content(samples) if long else contextlib.nullcontext():
            found = extractor([samples], sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return dict(found.to(pipe.dtype))

    def _embedded(self, texts: set[Tokens]) -> dict[Tokens, torch.Tensor]:
        """The embedding of every text; unknown embeddings are computed."""
        missing = sorted(texts - self._known.keys(), key=len)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            piece = missing[start : start + TEXTS_AT_ONCE]
            self._known.update(zip(piece, self._embed(piece), strict=True))
        for tokens in texts:
            self._known.move_to_end(tokens)
        found = {tokens: self._known[tokens] for tokens in texts}
        while len(self._known) > KEPT_TEXTS:
            self._known.popitem(last=False)
        return found

    def _embed(self, texts: Sequence[Tokens]) -> torch.Tensor:
        longest = max(len(tokens) for tokens in texts)
        ids = torch.full((len(texts), longest), self.pipe.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, tokens in enumerate(texts):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            mask[index, : len(tokens)] = 1
        device = self.pipe.device
        found = self.pipe.model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device))
        embedded: torch.Tensor = found.pooler_output
        return embedded


def content_seed(samples: np.ndarray[Any, Any]) -> int:
    """The seed that chooses the heard part of a long recording: equal for equal samples."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(samples).tobytes(), digest_size=4).digest(), "little")


@contextlib.contextmanager
def cropped_by_content(samples: np.ndarray[Any, Any]) -> Iterator[None]:
    """Seed numpy's global numbers with `content_seed`; CLAP chooses ten seconds of a longer recording with them.

    So a job that runs again gives the same result. For one thread at a time; no other code in a worker draws from these numbers.
    """
    with _CROPPING:
        state = np.random.get_state()
        np.random.seed(content_seed(samples))
        try:
            yield
        finally:
            np.random.set_state(state)


def _labels(given: Any) -> list[Any]:
    """Labels as a list; one text holds them with commas between."""
    labels = [one.strip() for one in given.split(",") if one.strip()] if isinstance(given, str) else list(given or ())
    if not labels:
        text = "candidate_labels is missing or empty; pass a list of texts, or one text with commas"
        raise ItemError("bad_parameter", text, STAGE)
    return labels
