"""The table of parity cases: one row a checkpoint, with every set of parameters that takes another way through the worker."""

from tests.parity.cases import audio, multimodal, text, vision
from tests.parity.cases.case import Case

__all__ = ["CASES", "Case"]

CASES = (*text.CASES, *audio.CASES, *vision.CASES, *multimodal.CASES)
