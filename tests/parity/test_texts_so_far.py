"""The text of the first tokens of a result is the beginning of its text, also where a tokenizer takes out spaces again."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers

from pipefleet_workers.adapters.writing.generate import TextGenerator
from pipefleet_workers.items import Assembly, Unit
from tests.parity.harness import Call, recording, running

ENDS = ["a", "n", "'", "t", "s", "m", "ve", "re", ".", ",", "!", "?", "don", "we", "##ing", "##n", "##t"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ENDS]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder with pieces of words as its tokens."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(path))
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=len(WORDS))
    model = transformers.GPT2LMHeadModel(config).eval()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    return recording(TextGenerator, pipe)


@pytest.mark.parametrize("cleans", [None, True, False])
def test_a_text_only_grows(generator: Any, cleans: bool | None) -> None:
    chance = random.Random(3)
    generator.pipe.tokenizer.clean_up_tokenization_spaces = cleans is None
    parameters: dict[str, Any] = {"return_full_text": False, "max_new_tokens": 1, "do_sample": False}
    if cleans is not None:
        parameters["clean_up_tokenization_spaces"] = cleans
    units: list[Unit] = []
    own = generator.prepare

    def note(decoded: Any) -> Any:
        prepared = own(decoded)
        units.extend(unit for found in prepared for unit in found)
        return prepared

    generator.prepare = note
    try:
        with running(generator, "text-generation") as engine:
            engine.run([Call(text, parameters) for text in ("don", "we n", "a")])
    finally:
        generator.prepare = own
    for unit in units:
        for _ in range(15):
            tokens = [chance.randrange(5, len(WORDS)) for _ in range(12)]
            whole = Assembly(unit.assembly.work, 1, context=unit.assembly.context, outputs={0: [tokens]})
            text = generator.finish(whole)[0]["generated_text"]
            before = ""
            for end in range(1, len(tokens) + 1):
                so_far = generator.text_so_far(unit, tokens[:end])
                assert so_far.startswith(before)
                before = so_far
            assert text.startswith(before)
