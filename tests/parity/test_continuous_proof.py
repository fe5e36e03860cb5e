"""The proof at the start of a worker: which models may let requests join and leave at every step, and with how many pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.writing.continuous import DecoderWriter
from pipefleet_workers.adapters.writing.generate import PROBED_TOKENS, TextGenerator
from pipefleet_workers.adapters.writing.paged import UnsuitedError
from pipefleet_workers.models import continuous
from pipefleet_workers.models.continuous import PAGE, begin_continuous, pages_of
from pipefleet_workers.process.watchdog import listen
from pipefleet_workers.settings import WorkerSettings
from tests.parity.cases.case import direct
from tests.parity.harness import Call, load, recording, running
from tests.parity.test_continuous import GREEDY, TASK, TEXTS, outputs
from tests.unit.worker.models.test_lanes import Hearing

POOL = Pool("writers", TASK, "tiny")


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = load(TASK)
    found.model.generation_config.eos_token_id = None  # a random model may end where it likes
    return found


def test_the_proof_passes_for_a_decoder_and_leaves_the_model_as_it_was(pipe: Any) -> None:
    adapter = TextGenerator(pipe)
    state = torch.random.get_rng_state()
    assert begin_continuous(adapter, POOL, {}, WorkerSettings(continuous="on"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert pipe.model.config._attn_implementation == "sdpa"
    with running(recording(TextGenerator, pipe), TASK) as plain:
        outputs(plain.run([Call(TEXTS[0], GREEDY)]))


def test_the_proof_gives_a_sign_of_life_with_every_few_steps(pipe: Any) -> None:
    """It takes hundreds of steps, which together may take longer than one step may."""
    heard = Hearing()
    hook = pipe.model.register_forward_pre_hook(heard.forward)
    listen(heard)
    try:
        begin_continuous(TextGenerator(pipe), POOL, {}, WorkerSettings(continuous="auto"))
    finally:
        listen(None)
        hook.remove()
    assert len(heard.forwards) > 100
    assert not heard.silence(PROBED_TOKENS + 1)


@pytest.mark.parametrize("setting", [{"continuous": "off"}, {"continuous": "auto", "warm_up": False}])
def test_without_a_proof_requests_run_in_batches(pipe: Any, setting: dict[str, Any]) -> None:
    adapter = TextGenerator(pipe)
    assert not begin_continuous(adapter, POOL, {}, WorkerSettings(**setting))
    assert adapter.continuous is None


def test_a_slower_writer_is_left_out_unless_it_is_asked_for(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "_relative_speed", lambda *_: 0.5)
    assert not begin_continuous(TextGenerator(pipe), POOL, {}, WorkerSettings())
    assert begin_continuous(TextGenerator(pipe), POOL, {}, WorkerSettings(continuous="on"))


def test_a_model_whose_pages_give_other_numbers_runs_in_batches(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DecoderWriter.numbers
    monkeypatch.setattr(DecoderWriter, "numbers", lambda *args, **named: [one + 0.1 for one in own(*args, **named)])
    assert not begin_continuous(TextGenerator(pipe), POOL, {}, WorkerSettings(continuous="on"))


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 420,
}


def models() -> dict[str, Any]:
    small = {**SIZES, "max_position_embeddings": 512}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 420, "initializer_range": 0.2}
    return {
        "gpt2": transformers.GPT2Config(**gpt),
        "opt": transformers.OPTConfig(**{**small, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        "qwen2": transformers.Qwen2Config(**small, num_key_value_heads=2),
        "gpt_neox": transformers.GPTNeoXConfig(**small),
        "gemma2": transformers.Gemma2Config(**small, num_key_value_heads=2, head_dim=8, sliding_window=16),
        "mistral": transformers.MistralConfig(**small, num_key_value_heads=2, sliding_window=16),
        "dynamic_rope": transformers.LlamaConfig(
            **small, num_key_value_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "mamba": transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=420),
        "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=420),
    }


@pytest.mark.parametrize("kind", sorted(models()))
def test_every_architecture_is_proved_or_runs_in_batches(pipe: Any, kind: str) -> None:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(models()[kind]).eval()
    model.generation_config.eos_token_id = None
    own = transformers.pipeline(TASK, model=model, tokenizer=pipe.tokenizer, device="cpu")
    adapter = recording(TextGenerator, own)
    proved = begin_continuous(adapter, POOL, {}, WorkerSettings(continuous="on"))
    assert proved == (kind in ("gpt2", "opt", "qwen2", "gpt_neox")), kind
    calls = [Call(text, {**GREEDY, "max_new_tokens": most}) for text in TEXTS[:3] for most in (3, 20)]
    adapter.batches.clear()
    with running(adapter, TASK) as engine:
        assert outputs(engine.run(calls)) == [direct(own, call) for call in calls]
        assert bool(adapter.batches) != proved


def test_a_pool_whose_own_parameters_need_batches_has_no_cache(pipe: Any) -> None:
    assert not begin_continuous(TextGenerator(pipe), POOL, {"num_beams": 2}, WorkerSettings(continuous="on"))


def test_answers_fill_a_short_table_of_positions_to_its_end(pipe: Any) -> None:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=420, bos_token_id=1, eos_token_id=3
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    own = transformers.pipeline(TASK, model=model, tokenizer=pipe.tokenizer, device="cpu")
    calls = [Call("the " * 12, {**GREEDY, "max_new_tokens": 500}), Call("Yes", {**GREEDY, "max_new_tokens": 59})]
    with running(recording(TextGenerator, own), TASK) as plain:
        wanted = outputs(plain.run(calls))
    adapter = recording(TextGenerator, own)
    assert begin_continuous(adapter, POOL, {}, WorkerSettings(continuous="on"))
    adapter.batches.clear()
    with running(adapter, TASK) as engine:
        assert outputs(engine.run(calls)) == wanted
    assert not adapter.batches


def test_the_cache_has_the_bytes_of_its_setting(pipe: Any) -> None:
    adapter = TextGenerator(pipe)
    config = pipe.model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    bounded = WorkerSettings(continuous="on", cache_bytes=20 * PAGE * token)
    assert pages_of(adapter, POOL, bounded).count == 20
    assert begin_continuous(adapter, POOL, {}, bounded)
    assert isinstance(adapter.continuous, DecoderWriter)
    assert adapter.continuous.bytes <= 22 * PAGE * token, "transformers adds two pages of its own"
    assert pages_of(adapter, POOL, WorkerSettings()).count == 64 * 512 // PAGE
    with pytest.raises(UnsuitedError, match="no page"):
        pages_of(adapter, POOL, WorkerSettings(cache_bytes=1))
