"""The lease transport against real servers: what dies, and what it shares the server with."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue
from redis import Redis

from pipefleet.queues.looking import queued_ids
from pipefleet_workers.delivery.leases import lease_of
from tests.integration.lease_world import (
    EMPTY,
    KEYS,
    NEVER,
    QUEUE,
    Taker,
    depth,
    held_messages,
    ledger_is_empty,
    list_name,
    push,
    transport_options,
    waits,
)
from tests.servers import Server, programs, until

# Deaths

VICTIM = """
import sys
from redis import Redis
from tests.integration.lease_world import Taker
url, port = sys.argv[1], int(sys.argv[2])
note = Redis(port=port)
taker = Taker(url, 64, {"lease_seconds": 1.0})
def receive(message):
    note.sadd("ran", message.headers["id"])
    message.ack()
taker.on_message = receive
while True:
    taker.poll(1)
"""


def test_no_message_is_lost_when_fetching_workers_are_killed(redis: Redis, server: Server) -> None:
    everything = {str(number) for number in range(3000)}
    for start in range(0, 3000, 500):
        push(redis, *(str(number) for number in range(start, start + 500)))
    for _ in range(3):
        before = redis.scard("ran")
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, server.url, str(server.port)])
        try:
            until(lambda before=before: redis.scard("ran") > before + random.randrange(50, 300))
        finally:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert {one.decode() for one in redis.smembers("ran")} | set(queued_ids(redis, QUEUE)) == everything
    last = Taker(server.url, 500)
    last.on_message = lambda message: (redis.sadd("ran", message.headers["id"]), message.ack())[0]
    until(lambda: (last.poll(), depth(redis) == EMPTY)[1], 60)
    last.close()
    assert {one.decode() for one in redis.smembers("ran")} == everything


@pytest.mark.parametrize("kept", [True, False], ids=["with its data", "without"])
@pytest.mark.parametrize("program", programs(), ids=lambda program: Path(program).name)
def test_a_worker_outlives_the_server(tmp_path: Path, program: str, kept: bool) -> None:
    server = Server(program, tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    worker: Taker | None = None
    try:
        with Redis(port=server.port) as client:
            push(client, "a", "b")
        worker = Taker(server.url, options={"renew_seconds": 0.2, "lease_seconds": 5.0})
        first, second = worker.take(2)
        server.kill()
        first.ack()  # while nobody is there to hear it
        if not kept:
            for file in (*tmp_path.glob("appendonlydir/*"), *tmp_path.glob("appendonly.aof")):  # the latter: Redis 6
                file.unlink()
        server.start()
        with Redis(port=server.port) as client:
            if kept:
                until(lambda: set(queued_ids(client, QUEUE)) == {"b"})
                assert worker.lost == []
                second.ack()
                until(lambda: ledger_is_empty(client))
            else:
                until(lambda: [lease.key for lease in worker.lost] == [second.delivery_tag])
    finally:
        if worker is not None:
            worker.messages.clear()
            worker.channel.ledger.flush(1.0)
        server.kill()


# With others

CELERY = """
import sys, time
from celery import Celery
from redis import Redis
from tests.integration.lease_world import QUEUE, TRANSPORT, transport_options
url, port = sys.argv[1], int(sys.argv[2])
note = Redis(port=port)
app = Celery("x", broker=url, broker_transport=TRANSPORT)
app.conf.update(task_default_queue=QUEUE, task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=2,
    worker_cancel_long_running_tasks_on_connection_loss=False, worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    broker_transport_options=transport_options(lease_seconds=3.0, on_dead=lambda letter: note.rpush("told", letter.reason)))
@app.task(name="note")
def run(name):
    note.rpush("started", name)
    while not note.exists("go"):
        time.sleep(0.01)
    note.rpush("ended", name)
app.Worker(pool="threads", concurrency=2, loglevel="WARNING", without_gossip=True, without_mingle=True, quiet=True,
    hostname="w@test").start()
"""


@pytest.fixture
def celery_worker(redis: Redis, server: Server) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CELERY, server.url, str(server.port)])
    yield process
    redis.set("go", 1)
    process.terminate()
    process.wait(20)


def test_a_celery_worker_that_loses_its_connections_runs_nothing_twice(
    redis: Redis, server: Server, celery_worker: subprocess.Popen[bytes]
) -> None:
    push(redis, *"abcdef")
    redis.lpush(list_name(3), "hostile")
    until(lambda: redis.llen("started") == 2)
    own = redis.client_id()
    for client in redis.client_list():
        if int(client["id"]) != own:
            redis.client_kill_filter(_id=client["id"])
    until(lambda: waits(redis, 4) or depth(redis)["unacked"] == 4)
    redis.set("go", 1)
    until(lambda: redis.llen("ended") >= 6)
    until(lambda: depth(redis) == EMPTY)
    assert sorted(redis.lrange("started", 0, -1)) == [b"a", b"b", b"c", b"d", b"e", b"f"]
    until(lambda: redis.lrange("told", 0, -1) == [b"it is not JSON"])


def test_a_celery_worker_is_inspected_and_gives_back_when_it_is_told_to_end(
    redis: Redis, server: Server, celery_worker: subprocess.Popen[bytes]
) -> None:
    from celery import Celery

    push(redis, *"abcdef")
    until(lambda: redis.llen("started") == 2)
    inspector = Celery("stock", broker=server.url).control.inspect(timeout=10.0, limit=1)
    stats = until(lambda: inspector.stats())
    assert stats["w@test"]["broker"]["transport_options"]["lease_seconds"] == 3.0
    celery_worker.terminate()
    redis.set("go", 1)
    celery_worker.wait(20)
    ended = {one.decode() for one in redis.lrange("ended", 0, -1)}
    assert redis.llen("ended") == len(ended) >= 2
    assert set(queued_ids(redis, QUEUE)) == set("abcdef") - ended
    assert ledger_is_empty(redis)  # and none of them counts as delivered


def test_a_stock_worker_takes_over_what_was_leased_and_delayed(
    redis: Redis, server: Server, taker: Callable[..., Taker]
) -> None:
    push(redis, "a", "b", "c")
    ours = taker(renew_seconds=NEVER, sweep_seconds=NEVER)
    ours.leases(3)[1].give_back(delay=0.5)
    until(lambda: depth(redis)["delayed"] == 1)
    options = {**transport_options(), "visibility_timeout": 0.2, "unacked_restore_throttle": 1}
    seen: list[str] = []
    with Connection(server.url, transport_options=options) as stock, stock.channel() as channel:
        queue = Queue(QUEUE)(channel)

        def got_all() -> bool:
            channel.qos.restore_visible(num=10, interval=1)
            if (message := queue.get(accept=["json"])) is not None:
                seen.append(message.headers["id"])
                message.ack()
            return len(seen) >= 3

        until(got_all)
    assert sorted(seen) == ["a", "b", "c"]


def acl_lines(role: str) -> str:
    """The line that the package's documentation gives for a role, for the test's queue."""
    import pipefleet_workers.delivery as package

    blocks = [block for block in str(package.__doc__).split("\n\n") if block.startswith("    ~Q*")]
    return " ".join(
        blocks[("worker", "producer").index(role)].replace(":Q", f":{QUEUE}").replace("~Q*", f"~{QUEUE}*").split()
    )


@pytest.mark.parametrize("without", ["", "+evalsha"])
def test_the_documented_rights_are_enough_for_a_worker_and_a_producer(
    redis: Redis, server: Server, without: str
) -> None:
    for role in ("worker", "producer"):
        redis.execute_command(
            "ACL", "SETUSER", role, "reset", "on", ">secret", *acl_lines(role).replace(f"{without} ", " ").split()
        )
    redis.execute_command("ACL", "LOG", "RESET")
    options = {"transport_options": {**transport_options()}}
    with Connection(f"redis://producer:secret@127.0.0.1:{server.port}/0", **options) as producer:
        with producer.Producer() as publisher:
            publisher.publish(
                [["a"], {}, None], routing_key=QUEUE, exchange="", headers={"task": "t", "id": "a"}, priority=3
            )
    worker = Taker(
        f"redis://worker:secret@127.0.0.1:{server.port}/0", options={"renew_seconds": 0.05, "lease_seconds": 0.5}
    )
    (first,) = worker.take(1)
    until(lambda: held_messages(redis)[0].seconds > 0.5)
    first.reject(requeue=True)
    (second,) = worker.take(1)
    lease = lease_of(second)
    assert lease is not None
    lease.give_back(delay=0.01)
    (third,) = worker.take(1)
    third.reject(requeue=False)
    until(lambda: worker.dead and redis.llen(KEYS["dead_key"]) == 1)
    worker.close()
    refused: Any = redis.acl_log()
    assert {one["object"] for one in refused} == ({"evalsha"} if without else set())
    with Redis(port=server.port, username="producer", password="secret") as limited:
        with pytest.raises(Exception, match=r"(?i)no permissions"):
            limited.lrange(list_name(3), 0, -1)


def _speaks_tls(program: str, folder: Path) -> bool:
    """Whether the server is built with TLS; without a certificate each build refuses to start, and says why."""
    command = [program, "--port", "0", "--tls-port", "1", "--save", ""]
    probe = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=30)
    return not any(reason in probe.stdout + probe.stderr for reason in ("Failed finding TLS support", "Bad directive"))


def test_it_speaks_tls_with_a_verified_certificate(tmp_path: Path) -> None:
    program = programs()[-1]
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("needs openssl")
    if not _speaks_tls(program, tmp_path):
        pytest.skip(f"{program} is built without TLS")
    tls = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no"]
    plain = Server(program, tmp_path)
    plain.kill()
    server = Server(program, tmp_path, "--tls-port", str(plain.port), *tls)
    worker: Taker | None = None
    try:
        with Redis(port=server.port) as client:
            push(client, "a")
            trust = {"ssl_ca_certs": str(certificate), "ssl_cert_reqs": "required"}
            worker = Taker(f"rediss://127.0.0.1:{plain.port}/0", connect={"ssl": trust})
            (message,) = worker.take(1)
            message.ack()
            until(lambda: ledger_is_empty(client))
    finally:
        if worker is not None:
            worker.close()
        server.kill()
