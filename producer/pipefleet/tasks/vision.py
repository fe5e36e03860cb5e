"""Tasks whose input is pictures or video alone."""

from __future__ import annotations

from pipefleet.tasks.shared import ACTIVATION, LABEL_COUNT
from pipefleet.tasks.spec import CostUnit, Media, TaskSpec

ROWS = (
    TaskSpec(
        name="image-classification",
        media=Media.IMAGE,
        parameters={"top_k": LABEL_COUNT, "function_to_apply": ACTIVATION},
        returns="[{label, score}]",
        cost_unit=CostUnit.IMAGES,
    ),
)
