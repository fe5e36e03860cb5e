"""Tasks whose input is text alone."""

from __future__ import annotations

from pipefleet_workers.adapters.pipelines import question_answering, text2text
from pipefleet_workers.adapters.table.row import TEXT, WRITING, TaskRuntime
from pipefleet_workers.adapters.text.encoder import FeatureExtractor, TextClassifier
from pipefleet_workers.adapters.text.fill_mask import MaskFiller
from pipefleet_workers.adapters.text.question_answering import QuestionAnswerer
from pipefleet_workers.adapters.text.table_question_answering import TableReader
from pipefleet_workers.adapters.text.token_classification import TokenClassifier
from pipefleet_workers.adapters.text.zero_shot import ZeroShotTextClassifier
from pipefleet_workers.adapters.writing.decision import Decider
from pipefleet_workers.adapters.writing.generate import TextGenerator
from pipefleet_workers.adapters.writing.seq2seq import TextRewriter

ROWS = {
    "decision": TaskRuntime(Decider, WRITING),
    "feature-extraction": TaskRuntime(FeatureExtractor, TEXT),
    "fill-mask": TaskRuntime(MaskFiller, TEXT),
    "question-answering": TaskRuntime(QuestionAnswerer, TEXT, question_answering.NAME),
    "summarization": TaskRuntime(TextRewriter, WRITING, text2text.PREFIX + "summarization"),
    "table-question-answering": TaskRuntime(TableReader, WRITING),
    "text-classification": TaskRuntime(TextClassifier, TEXT),
    "text-generation": TaskRuntime(TextGenerator, WRITING),
    "text2text-generation": TaskRuntime(TextRewriter, WRITING, text2text.PREFIX + "text2text-generation"),
    "token-classification": TaskRuntime(TokenClassifier, TEXT),
    "translation": TaskRuntime(TextRewriter, WRITING, text2text.PREFIX + "translation"),
    "translation_xx_to_yy": TaskRuntime(TextRewriter, WRITING, text2text.PREFIX + "translation"),
    "zero-shot-classification": TaskRuntime(
        ZeroShotTextClassifier, TEXT, example_parameters={"candidate_labels": ["sea", "trees", "old age"]}
    ),
}
