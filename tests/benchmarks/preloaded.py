"""What the process behind `processes` imports once, so that each contender's process is forked in milliseconds.

Nothing here may start a thread or touch a device: a fork would lose the one and break the other.
"""

import numpy  # noqa: F401
import torch  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.pipelines  # noqa: F401

import tests.benchmarks.bench
import tests.benchmarks.by_hand.pictures
import tests.benchmarks.by_hand.speech
import tests.benchmarks.by_hand.texts
import tests.benchmarks.in_process  # noqa: F401
