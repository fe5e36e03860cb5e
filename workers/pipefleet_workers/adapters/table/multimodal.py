"""Tasks that bring text together with pictures, sound or video."""

from __future__ import annotations

from pipefleet_workers.adapters.pipelines import image_to_text, visual_question_answering
from pipefleet_workers.adapters.table.row import IMAGE, WRITING, Sizing, TaskRuntime
from pipefleet_workers.adapters.vision.document_question_answering import document_answerer
from pipefleet_workers.adapters.vision.question_answering import visual_answerer
from pipefleet_workers.adapters.vision.zero_shot import ImageLabeller
from pipefleet_workers.adapters.vision.zero_shot_detection import ObjectFinder
from pipefleet_workers.adapters.writing.equal_shapes import EqualWriter
from pipefleet_workers.adapters.writing.multimodal import image_text_writer

_SEEING = Sizing(slice_items=2, cpu_cost=WRITING.cpu_cost, gpu_cost=WRITING.gpu_cost)
_PAGES = Sizing(slice_items=2, cpu_cost=2048, gpu_cost=32_768)
_SOUGHT = {"candidate_labels": ["a cat", "the wide sea"]}

ROWS = {
    "any-to-any": TaskRuntime(image_text_writer, _SEEING),
    "document-question-answering": TaskRuntime(document_answerer, _PAGES),
    "image-text-to-text": TaskRuntime(image_text_writer, _SEEING),
    "image-to-text": TaskRuntime(EqualWriter, _SEEING, transformers_task=image_to_text.NAME),
    "visual-question-answering": TaskRuntime(visual_answerer, IMAGE, transformers_task=visual_question_answering.NAME),
    "zero-shot-image-classification": TaskRuntime(ImageLabeller, IMAGE, example_parameters=_SOUGHT),
    "zero-shot-object-detection": TaskRuntime(ObjectFinder, IMAGE, example_parameters=_SOUGHT),
}
