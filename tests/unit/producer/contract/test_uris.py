"""Which URIs messages may name: outputs that lie in somebody's run, shards that are none of their run, ways around a prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import MAX_SHARD_ITEMS, JobItem, JobMessage, Shard
from pipefleet.contract.uris import lies_in_run, output_fault, run_fault, shard_fault, uri_fault
from pipefleet.errors import AccessDeniedError, ContractError, InputError, PipefleetError, UsageError
from pipefleet.queues.looking import queue_depth
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.storage.uri_gate import UriGate

TASK = "text-classification"
STORE = "s3://pipefleet/store/"
RUN = RunLayout("s3://bucket/out/")
OF_A_RUN = [
    RUN.plan, RUN.run, RUN.moved, RUN.shard(0), RUN.part(3), RunLayout(RUN.uri, "parquet").part(100_000), RUN.failed_shard(1),
    RUN.failures, RUN.refused_shard(0), RUN.resumed, RUN.cancelled, RUN.stopped, RUN.success, f"{RUN.artifacts(12)}mask-0.npy",
]  # fmt: skip
DISGUISED = [
    "s3://bucket/out//_run/plan.json", "s3://bucket/out/_run//plan.json", "s3://bucket/out/%5Frun/plan.json",
    "s3://bucket/out/_RUN/plan.json", "s3://bucket/out/_run./plan.json", "s3://bucket/out/PART-00000.JSONL",
    "s3://bucket/out/part-00000.jsonl.", "s3://bucket/out//artifacts//00000012/x", "s3://bucket/out/_success",
    "s3://bucket/out/. /_run/plan.json", "s3://bucket/out/artifacts/%20/00000012/x", "s3://bucket/out/artifacts/20261231/mask-0.npy",
    "s3://bucket/out/artifacts/20261399/x.json",
]  # fmt: skip
ELSEWHERE = [
    "s3://results/one.json", "s3://bucket/out/run/one.json", "s3://bucket/out/parts/part-1.json", "s3://bucket/artifacts/one.json",
    f"{RUN.requeued}run1-00000-audio%2Fa.wav-0.json", f"{RUN.requeued}run1-00000-..%2F..%2Fx-3.json", "s3://bucket/a//b.json",
    "s3://bucket/artifacts/20261231/one.json", "s3://bucket/artifacts/20261231/", "s3://pipefleet/results/one.json",
]  # fmt: skip


@pytest.mark.parametrize("uri", [*OF_A_RUN, *DISGUISED])
def test_no_single_job_writes_inside_a_run(uri: str) -> None:
    assert lies_in_run(uri)
    assert "inside the output of a run" in str(output_fault(uri, "job", STORE))


@pytest.mark.parametrize("uri", ELSEWHERE)
def test_what_is_not_a_runs_own_may_be_written(uri: str) -> None:
    assert output_fault(uri, "job", STORE) is None


@pytest.mark.parametrize(
    ("folder", "job_id"),
    [("s3://bucket/out/", "_run/stopped"), ("s3://bucket/out/_run/refused/", "00000"), ("s3://bucket/out/", "a/../x")],
)
def test_the_id_of_a_job_leads_into_no_run_either(folder: str, job_id: str) -> None:
    assert output_fault(folder, job_id, STORE) is not None


@pytest.mark.parametrize(
    "below",
    ["uploads/ab/abcd.txt", "results/other.json", "results/", "/uploads/a", "%75ploads/a", "RESULTS/a", "results./a"],
)
def test_no_job_writes_over_what_others_uploaded_or_got(below: str) -> None:
    assert "fleet's store" in str(output_fault(STORE + below, "job", STORE))
    assert run_fault(f"{STORE}results/run/", STORE) is not None


@pytest.mark.parametrize(
    "uri",
    [
        "s3://public/../private/a", "s3://public/a/./b", "s3://public/..", "s3://public/%2e%2e/private/a", "s3://public/.%2E/a",
        "S3://public/a", "s3:/public/a", "http://public/a", "/public/a", "file:///public/a", "s3://public.evil./a",
        "s3://PUBLIC/a", "s3://public%2Fa", "s3://public\\a", "s3://pub lic/a", "s3://public@evil/a", "s3://public:80/a",
        "s3://public/\ud800", "s3://public/\x00", "s3://public/" + "x" * 1025,
    ],
)  # fmt: skip
def test_a_uri_that_some_server_reads_otherwise_passes_no_gate(uri: str) -> None:
    gate = UriGate(("s3://public/",), STORE)
    assert uri_fault(uri) is not None
    with pytest.raises((AccessDeniedError, InputError)) as caught:
        gate.require_reading(uri)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert gate.output(message(output=uri)) is not None


@pytest.mark.parametrize("uri", ["s3://public-evil/a", "s3://publi/c/a", "s3://other/public/a", "s3://public.evil/a"])
def test_siblings_of_a_prefix_are_outside_of_it(uri: str) -> None:
    gate = UriGate(("s3://public",), STORE)
    with pytest.raises(AccessDeniedError, match="outside what this worker may read"):
        gate.require_reading(uri)
    assert "outside what this worker may write" in str(gate.output(message(output=uri)))
    gate.require_reading("s3://public/a")
    assert gate.output(message(output="s3://public/a")) is None


def message(**fields: Any) -> JobMessage:
    return JobMessage("job", TASK, items=(JobItem("0", "text"),), **fields)


def shard(index: int = 3, **changes: Any) -> Shard:
    return replace(Shard("run1", RUN.uri, RUN.shard(index), index, 48, 16), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"uri": RUN.shard(4)}, {"uri": "s3://private/secrets.jsonl"}, {"uri": RUN.plan},
        {"uri": f"{RUN.uri}../x/_run/shards/00003.jsonl"}, {"uri": RUN.shard(3).replace("_run/", "_run//")},
        {"run_uri": "s3://other/out/"}, {"run_uri": RUN.uri[:-1]},
        {"run_uri": RUN.uri + "/"}, {"run_uri": "file:///out/"}, {"index": 2**28}, {"first": 2}, {"first": 3 * MAX_SHARD_ITEMS + 1},
        {"count": 0},
    ],
)  # fmt: skip
def test_a_shard_that_is_none_of_its_run_is_refused(changes: dict[str, Any]) -> None:
    assert shard_fault(shard(), STORE) is None
    with pytest.raises(ContractError) as caught:
        UriGate(store=STORE).require_shard(shard(**changes))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("uri", [RUN.control, RUN.shards, RUN.artifacts(0), "s3://pipefleet/store/results/"])
def test_no_run_lies_inside_of_another_one(uri: str) -> None:
    layout = RunLayout(uri)
    assert shard_fault(Shard("run1", uri, layout.shard(0), 0, 0, 1), STORE) is not None


@given(
    st.lists(
        st.sampled_from(["", ".", "..", "_run", "%2e", "%5Frun", "a", "part-00000.jsonl", "artifacts", "00000001"])
    )
)
def test_whatever_an_output_is_made_of_it_never_names_a_part_of_a_run(names: list[str]) -> None:
    uri = "s3://bucket/" + "/".join(names)
    if output_fault(uri, "job", STORE) is None:
        kept = [name for name in names if name]
        assert not {".", "..", "_run", "part-00000.jsonl"}.intersection(kept)
        assert ["artifacts", "00000001"] not in [kept[place : place + 2] for place in range(len(kept))]


class TestProducer:
    @pytest.mark.parametrize("uri", [*OF_A_RUN, f"{STORE}uploads/a.json", "s3://bucket/../a", "file:///a"])
    def test_it_queues_no_job_that_would_write_there(self, client: Client, uri: str) -> None:
        with pytest.raises(UsageError):
            client.submit(TASK, "text", output=uri)
        assert not client.redis.keys("*job:*")
        assert not any(queue_depth(client.redis, f"pipefleet.{TASK}").values())

    @pytest.mark.parametrize("uri", [RUN.control, RUN.artifacts(0), f"{STORE}results/", "s3://bucket/a/../b/"])
    def test_it_plans_no_run_there(self, client: Client, uri: str) -> None:
        with pytest.raises(UsageError):
            client.map(TASK, ["text"], output=uri)

    def test_a_deadline_beyond_the_contract_is_refused_before_anything_is_queued(self, client: Client) -> None:
        with pytest.raises(InputError, match="before the year 2100"):
            client.submit(TASK, "text", expires=1e300)
        assert not client.redis.keys("*job:*")

    def test_an_etag_that_cannot_stand_in_a_header_is_refused(
        self, client: Client, store: ObjectStore, prefix: str
    ) -> None:
        store.put(f"{prefix}a.txt", b"text")
        for etag in ("a\r\nx-evil: 1", "\x00", "ü", "x" * 300):
            with pytest.raises(PipefleetError, match="etag"):
                client.submit(TASK, {"$ref": f"{prefix}a.txt", "etag": etag})
