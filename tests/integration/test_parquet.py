"""Runs whose parts are Parquet: the same rows as JSON lines, embeddings as vectors, resumed and ended alike."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import Shard
from pipefleet.errors import ContractError, RunError
from pipefleet.queues.keys import run_key
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.consume.shards import require_format
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.checkpoints.media import image, image_bytes
from tests.conftest import POOLS, write_fleet
from tests.parity.harness import assert_same
from tests.parity.in_process_worker import working

WAIT = 120
TEXTS, EMBED, PICTURES = "text-classification", "feature-extraction", "image-classification"
installed = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client, and workers for three tasks in this process."""
    folder = tmp_path_factory.mktemp("parquet")
    pools = {name: POOLS[name] for name in ("embed", "classify", "pictures")}
    fleet = write_fleet(folder / "fleet.toml", pools)
    with Stack(folder / "data", fleet=fleet, pools=(), flower=False) as stack, in_environment(stack.environment()):
        with Client() as one:
            served = [working(one.fleet, one.fleet.pools[name], one.settings) for name in pools]
            with served[0], served[1], served[2]:
                yield one


def table(store: ObjectStore, uri: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(store.get(uri)))


def without_provenance(rows: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "provenance"} for row in rows]


@installed
def test_embeddings_are_vectors_of_fixed_size(client: Client, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.dataset

    texts = [f"text number {index}" for index in range(40)]
    arguments: dict[str, Any] = {"parameters": {"pooling": "mean"}, "shard_size": 16}
    lines = client.map(EMBED, texts, output="s3://pipefleet/e-lines/", **arguments)
    run = client.map(EMBED, texts, output="s3://pipefleet/e-parquet/", format="parquet", **arguments)
    ended = run.wait(timeout=WAIT)
    assert (ended.state, ended.items, ended.shards) == ("succeeded", 40, 3)
    parts = [entry.key for entry in client.store.list("s3://pipefleet/e-parquet/part-")]
    assert parts == [f"e-parquet/part-{index:05d}.parquet" for index in range(3)]
    for key in parts:
        (tmp_path / Path(key).name).write_bytes(client.store.get(f"s3://pipefleet/{key}"))
    whole = pyarrow.dataset.dataset(tmp_path).to_table()
    assert whole.num_rows == 40
    kind = whole.schema.field("output").type
    assert (kind.value_type, kind.list_size > 1) == (pyarrow.float32(), True)
    assert whole["input"].to_pylist() == texts
    lines.wait(timeout=WAIT)
    assert_same(without_provenance(run.results()), without_provenance(lines.results()))
    assert all(row["provenance"]["model"] for row in run.results())


@installed
def test_other_results_and_failures_are_the_same_rows(client: Client) -> None:
    client.store.put("s3://pipefleet/p/in/a.png", image_bytes(image(40, 30)))
    client.store.put("s3://pipefleet/p/in/b.png", b"nothing")
    found = {}
    for name in ("jsonl", "parquet"):
        run = client.map(PICTURES, "s3://pipefleet/p/in/", output=f"s3://pipefleet/p/{name}/", format=name)
        ended = run.wait(timeout=WAIT)
        assert (ended.state, ended.succeeded, ended.failed) == ("partial", 1, 1)
        found[name] = without_provenance(client.run(run.uri).results()), list(run.failures())
    assert found["parquet"] == found["jsonl"]
    content = table(client.store, "s3://pipefleet/p/parquet/part-00000.parquet")
    assert content["error"].to_pylist()[1]["code"] == "bad_media"
    assert content["input"].to_pylist()[0] == "s3://pipefleet/p/in/a.png"
    again = client.map(PICTURES, run.failures_uri, output="s3://pipefleet/p/again/", format="parquet")
    assert again.wait(timeout=WAIT).failed == 1
    assert [row["error"]["code"] for row in again.results()] == ["bad_media"]


@installed
def test_dicts_and_parameters_come_back_as_they_were(client: Client) -> None:
    rows: list[Any] = [
        {"inputs": "a text", "parameters": {"top_k": 1}},
        {"inputs": {"text": "a text", "text_pair": "and its pair"}, "id": "pair"},
    ]
    run = client.map(TEXTS, rows, output="s3://pipefleet/dicts/", format="parquet")
    assert run.wait(timeout=WAIT).state == "succeeded"
    one, pair = run.results()
    assert (one["input"], one["parameters"], pair["input"], pair["id"]) == (
        "a text",
        {"top_k": 1},
        rows[1]["inputs"],
        "pair",
    )
    assert "parameters" not in pair


@installed
def test_a_run_is_finished_from_object_storage_alone(client: Client) -> None:
    uri = "s3://pipefleet/resumed/"
    run = client.map(TEXTS, [f"text {i}" for i in range(40)], output=uri, shard_size=10, format="parquet")
    run.wait(timeout=WAIT)
    for name in ("items", "failed", "parts"):
        client.redis.delete(run_key(run.id, name))
    client.redis.delete(run_key(run.id))
    client.store.delete(f"{uri}part-00002.parquet")
    client.store.delete(RunLayout.at(uri).success)
    reopened = client.run(uri)
    assert reopened.resume() == 1
    ended = reopened.wait(timeout=WAIT)
    assert (ended.state, ended.items, ended.succeeded) == ("succeeded", 40, 40)
    assert [row["id"] for row in reopened.results()] == [str(i) for i in range(40)]


def test_without_pyarrow_the_format_is_refused_before_anything_is_written(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"need pyarrow: pip install 'pipefleet\[parquet\]'"):
        client.map(TEXTS, ["a"], output="s3://pipefleet/none/", format="parquet")
    with pytest.raises(RunError, match="format must be one of jsonl, parquet, not 'xml'"):
        client.map(TEXTS, ["a"], output="s3://pipefleet/none/", format="xml")
    assert main(["map", TEXTS, "s3://pipefleet/", "--output", "s3://pipefleet/none/", "--format", "parquet"]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not list(client.store.list("s3://pipefleet/none/"))
    shard = Shard("run", "s3://pipefleet/none/", "s3://pipefleet/none/_run/shards/00000.jsonl", 0, 0, 1, "parquet")
    with pytest.raises(ContractError, match="this worker cannot write its part"):
        require_format(shard)
    require_format(Shard.from_json({**shard.to_json(), "format": "jsonl"}))


def test_json_lines_are_not_named_on_the_wire() -> None:
    shard = Shard("run", "s3://b/o/", "s3://b/o/_run/shards/00000.jsonl", 0, 0, 1)
    assert "format" not in shard.to_json()
    assert Shard.from_json(shard.to_json()) == shard
    other = Shard.from_json({**shard.to_json(), "format": "parquet"})
    assert (other.format, Shard.from_json(other.to_json())) == ("parquet", other)
    with pytest.raises(ContractError, match="texts as run_id, run_uri, uri and format"):
        Shard.from_json({**shard.to_json(), "format": 1})
