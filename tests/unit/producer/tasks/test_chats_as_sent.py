"""What stands beside a prompt: further keys of messages, switches of chat templates, modes and padding that change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError
from pipefleet.tasks import task_spec
from pipefleet.tasks.parameters import called_parameters
from pipefleet_workers.adapters.table import RUNTIME
from tests.checkpoints.media import image
from tests.parity.harness import Call, assert_same, load, recording, running

GREEDY = {"max_new_tokens": 4, "do_sample": False}
WRITE, CHAT, ANY, VQA = "text-generation", "image-text-to-text", "any-to-any", "visual-question-answering"
SAID = {"name": "Ada", "tool_calls": None, "reasoning_content": "a sum"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.reasoning_content }} {% if enable_thinking %}think{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
)


def spoken(task: str, **further: Any) -> list[dict[str, Any]]:
    content: Any = "one two" if task == WRITE else [{"type": "text", "text": "one two"}]
    return [{"role": "user", "content": content, **further}]


def asked(task: str, **parameters: Any) -> dict[str, Any]:
    return {**GREEDY, **parameters} if task == WRITE else {"generate_kwargs": dict(GREEDY), **parameters}


def outputs(task: str, pipe: Any, calls: list[Call]) -> list[Any]:
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        outcomes = engine.run(calls)
    assert [one.failure for one in outcomes] == [None] * len(calls)
    return [one.output for one in outcomes]


@pytest.mark.parametrize("task", [WRITE, CHAT, ANY])
def test_further_keys_of_a_message_reach_the_template_and_come_back(client: Client, task: str) -> None:
    pipe, chat = load(task), spoken(task, **SAID)
    (pipe.tokenizer if task == WRITE else pipe.processor).chat_template = TEMPLATE
    travelling = client.preparer(task_spec(task)).prepare(chat)
    assert travelling == chat
    named, plain = outputs(task, pipe, [Call(travelling, asked(task)), Call(spoken(task), asked(task))])
    (record,) = pipe(**{"text_inputs" if task == WRITE else "text": chat}, **asked(task))
    assert named[0]["generated_text"] == record["generated_text"]
    assert named[0]["generated_text"][0] == chat[0]
    assert "name" not in plain[0]["generated_text"][0]


@pytest.mark.parametrize(
    "further", [{"tool_calls": [{"id": "a"}]}, {"name": 3}, {"audio": {"id": "x"}}, {"chat_template": "x"}]
)
def test_a_further_key_holds_a_text_or_nothing(client: Client, further: dict[Any, Any]) -> None:
    for task in (WRITE, CHAT, ANY):
        with pytest.raises(InputError, match="beside role and content"):
            client.preparer(task_spec(task)).prepare([{**spoken(task)[0], **further}])


@pytest.mark.parametrize("task", [CHAT, ANY])
def test_switches_of_a_template_are_heard(task: str) -> None:
    pipe = load(task)
    pipe.processor.chat_template = TEMPLATE
    switches = {"enable_thinking": True}
    assert called_parameters(task_spec(task), switches) == switches
    thinking, silent = outputs(
        task, pipe, [Call(spoken(task), asked(task, return_tensors=True, enable_thinking=one)) for one in (True, False)]
    )
    for found, switched in ((thinking, True), (silent, False)):
        (record,) = pipe(text=spoken(task), **asked(task, return_tensors=True, enable_thinking=switched))
        assert found[0]["generated_token_ids"] == record["generated_token_ids"].tolist()
    assert len(thinking[0]["generated_token_ids"]) > len(silent[0]["generated_token_ids"])


def test_a_generation_mode_is_text() -> None:
    spec, pipe = task_spec(ANY), load(ANY)
    spec.check({"generation_mode": "text"})
    said, unsaid = outputs(ANY, pipe, [Call("one", asked(ANY, generation_mode="text")), Call("one", asked(ANY))])
    assert said == unsaid == pipe(text="one", **asked(ANY, generation_mode="text"))
    with pytest.raises(ParameterError, match="text-to-audio is the task for sound"):
        spec.check({"generation_mode": "audio"})


def test_padding_of_a_question_changes_nothing() -> None:
    spec, asking = task_spec(VQA), {"image": image(32, 32), "question": "What?"}
    paddings = [True, False, "longest", "do_not_pad"]
    for padding in paddings:
        spec.check({"padding": padding})
    plain, *padded = outputs(VQA, load(VQA), [Call(asking), *[Call(asking, {"padding": one}) for one in paddings]])
    for found in padded:
        assert_same(found, plain)
