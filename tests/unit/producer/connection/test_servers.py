"""The servers that other tests start: each make answers, over TLS too, and a replica has its primary's data."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
from redis import Redis

from tests.servers import Server, distribution_redis, moto_server, programs, redis_6, tls_server, until, valkey


@pytest.mark.parametrize("program", sorted({valkey(), redis_6(), *programs()}))
def test_each_make_answers(program: str, tmp_path: Path) -> None:
    server = Server(program, tmp_path)
    try:
        with server.client() as client:
            assert client.set("a", "b")
    finally:
        server.kill()


def test_a_replica_has_the_data_of_its_primary_and_takes_no_writes_until_it_leads(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (Server(valkey(), folder) for folder in folders)
    try:
        with one.client() as primary, two.client() as replica:
            primary.set("a", "b")
            two.follow(one)
            assert replica.get("a") == b"b"
            two.lead()
            until(lambda: replica.set("a", "c"))
    finally:
        one.kill()
        two.kill()


@pytest.mark.skipif(distribution_redis() is None, reason="no server program of this machine speaks TLS")
def test_a_server_speaks_tls(tmp_path: Path) -> None:
    with tls_server(tmp_path) as (_, url), Redis.from_url(url) as client:
        assert client.ping()


def test_moto_keeps_an_object() -> None:
    with moto_server() as url:
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="key", Body=b"body")
        assert client.get_object(Bucket="bucket", Key="key")["Body"].read() == b"body"
