"""Scripts by digest: with a server that knows them, one that does not, and a user who may run EVAL alone."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from pipefleet.client import Client
from pipefleet.connection.scripts import ScriptBatch, run_script
from pipefleet.contract.messages import JobState
from pipefleet.queues.keys import ledger_keys
from pipefleet.queues.looking import queue_depth
from pipefleet.settings import load_settings
from tests.nursery import TASK, Nursery, long_texts
from tests.servers import Server, distribution_redis, redis_6, until, valkey

COUNT = "return redis.call('INCRBY', KEYS[1], ARGV[1])"
PROGRAMS = [one for one in (valkey(), distribution_redis(), redis_6()) if one is not None]
NAMES = ["valkey", "distribution", "6.2"][: len(PROGRAMS)]


@pytest.fixture(params=PROGRAMS, ids=NAMES, scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(request.param, tmp_path_factory.mktemp("server"))
    yield one
    one.kill()


@pytest.fixture
def redis(server: Server) -> Iterator[Any]:
    """A client of the server, which knows no script and has nobody refused yet."""
    with server.client() as client:
        client.flushall()
        client.script_flush()
        client.config_resetstat()
        client.acl_log_reset()
        yield client


def calls(redis: Any) -> tuple[int, int]:
    """How often EVALSHA and EVAL came since the statistics began."""
    found = redis.info("commandstats")
    evalsha, plain = (found.get(f"cmdstat_{name}", {}) for name in ("evalsha", "eval"))
    return evalsha.get("calls", 0) + evalsha.get("rejected_calls", 0), plain.get("calls", 0)


def refusals(redis: Any) -> list[tuple[str, int]]:
    """What Redis has refused for a want of rights, and how often."""
    return [(one["object"], int(one["count"])) for one in redis.acl_log()]


def user(server: Server, *rights: str) -> Redis:
    """A client whose user has these rights on every key."""
    name = uuid.uuid4().hex
    with server.client() as admin:
        admin.execute_command("ACL", "SETUSER", name, "on", ">secret", "~*", "-@all", "+@connection", *rights)
    return server.client(username=name, password="secret")


def test_the_text_is_sent_only_to_a_server_that_does_not_know_the_script(redis: Any) -> None:
    assert [run_script(redis, COUNT, ["n"], 1) for _ in range(3)] == [1, 2, 3]
    assert calls(redis) == (3, 1)
    redis.script_flush()
    assert [run_script(redis, COUNT, ["n"], 1) for _ in range(3)] == [4, 5, 6]
    assert calls(redis) == (6, 2)


def test_a_batch_has_its_answers_in_order_and_runs_every_call_once(redis: Any) -> None:
    double = COUNT.replace("ARGV[1]", "2 * ARGV[1]")
    redis.set("word", "x")
    assert run_script(redis, COUNT, ["known"], 1) == 1
    batch = ScriptBatch(redis)
    for script, key, by in ((double, "a", 1), (COUNT, "b", 5), (COUNT, "word", 1), (double, "a", 10)):
        batch.add(script, [key], by)
    first, second, error, last = batch.run()
    assert (first, second, last) == (2, 5, 22)
    assert isinstance(error, ResponseError)
    assert [redis.get(key) for key in "ab"] == [b"22", b"5"]
    assert ScriptBatch(redis).run() == []


def test_a_user_of_an_earlier_release_is_refused_once_and_goes_on_with_the_text(server: Server, redis: Any) -> None:
    with user(server, "+eval", "+incrby") as old:
        assert [run_script(old, COUNT, ["n"], 1) for _ in range(3)] == [1, 2, 3]
        batch = ScriptBatch(old)
        batch.add(COUNT, ["n"], 1)
        assert batch.run() == [4]
    assert refusals(redis) == [("evalsha", 1)]
    with user(server, "+eval", "+incrby") as old:
        batch = ScriptBatch(old)
        batch.add(COUNT, ["n"], 1)
        batch.add(COUNT, ["n"], 1)
        assert batch.run() == [5, 6]
        assert run_script(old, COUNT, ["n"], 1) == 7
    assert [one for one, _ in refusals(redis)] == ["evalsha", "evalsha"]


def test_a_right_to_evalsha_on_other_keys_is_none(server: Server, redis: Any) -> None:
    name = uuid.uuid4().hex
    try:
        redis.execute_command(
            "ACL", "SETUSER", name, "on", ">secret", "+@connection", "(~n +eval +incrby)", "(~m +evalsha)"
        )
    except ResponseError:
        pytest.skip("Redis before 7.0 knows no rights by key")
    with server.client(username=name, password="secret") as control:
        assert [run_script(control, COUNT, ["n"], 1) for _ in range(3)] == [1, 2, 3]
    assert sum(count for _, count in refusals(redis)) == 1


def test_who_may_run_no_script_is_refused_and_may_be_given_the_right_later(server: Server, redis: Any) -> None:
    with user(server, "+incrby") as nobody:
        with pytest.raises(NoPermissionError):
            run_script(nobody, COUNT, ["n"], 1)
        batch = ScriptBatch(nobody)
        batch.add(COUNT, ["n"], 1)
        assert isinstance(batch.run()[0], NoPermissionError)
        assert redis.get("n") is None
        name = nobody.connection_pool.connection_kwargs["username"]
        redis.execute_command("ACL", "SETUSER", name, "+eval", "+evalsha")
        redis.config_resetstat()
        assert [run_script(nobody, COUNT, ["n"], 1) for _ in range(2)] == [1, 2]
        assert calls(redis) == (2, 1)


def test_a_script_that_is_refused_a_command_is_not_run_again(server: Server, redis: Any) -> None:
    script = "redis.call('INCR', KEYS[1]) return redis.call('DEL', KEYS[1])"
    with user(server, "+eval", "+evalsha", "+incr") as limited:
        for _ in range(2):
            with pytest.raises(ResponseError):
                run_script(limited, script, ["n"])
    assert redis.get("n") == b"2"


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    one = Nursery(tmp_path_factory.mktemp("nursery"))
    yield one
    one.close()


@pytest.fixture
def ours(
    server: Server, redis: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nursery: Nursery
) -> dict[str, str]:
    """The settings that lead clients and workers to the server, which are this process's too."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[pools.default]\ntask = "{TASK}"\nmodel = "{nursery.model}"\n')
    found = {"PIPEFLEET_REDIS_URL": server.url, "PIPEFLEET_FLEET": str(fleet)}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


def everything_runs(redis: Any, client: Client, prefix: str, texts: list[str]) -> None:
    """Jobs and a run, to their ends, each once: nothing is delivered twice, and nothing stays behind."""
    jobs = [client.submit(TASK, text) for text in texts]
    run = client.map(TASK, texts, output=f"{prefix}{uuid.uuid4().hex}/", shard_size=5)
    assert all(job.result(timeout=60)[0]["score"] > 0 for job in jobs)
    assert [job.status() for job in jobs] == [JobState.SUCCEEDED] * len(jobs)
    ended = run.wait(timeout=60)
    assert (ended.state, ended.succeeded) == ("succeeded", len(texts))
    keys = ledger_keys(run.plan.queue)
    until(lambda: not redis.exists(keys["unacked_key"], keys["deliveries_key"]))
    assert redis.exists(keys["dead_key"], keys["unreported_key"]) == 0
    assert not any(queue_depth(redis, run.plan.queue).values())


def test_jobs_run_while_the_server_forgets_its_scripts(
    redis: Any, nursery: Nursery, environment: dict[str, str], prefix: str, ours: dict[str, str], server: Server
) -> None:
    over = threading.Event()

    def forget() -> None:
        with server.client() as client:
            while not over.wait(0.005):  # a server that does nothing else is slow
                client.script_flush()

    flushing = threading.Thread(target=forget, name="forget")
    flushing.start()
    try:
        pid = nursery.start({**environment, **ours})
        with Client(load_settings()) as client:
            everything_runs(redis, client, prefix, long_texts(60))
    finally:
        over.set()
        flushing.join()
    assert nursery.stop(pid) == 0
    assert "Traceback" not in nursery.log(pid)


def test_a_producer_of_an_earlier_release_works_with_its_rights(
    redis: Any, nursery: Nursery, environment: dict[str, str], prefix: str, ours: dict[str, str],
    server: Server, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    redis.execute_command("ACL", "SETUSER", "old", "on", ">secret", "~*", "&*", "+@all", "-evalsha")
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", server.url.replace("redis://", "redis://old:secret@"))
    pid = nursery.start({**environment, **ours})
    with Client(load_settings()) as client:
        everything_runs(redis, client, prefix, long_texts(20))
    assert {one for one, _ in refusals(redis)} == {"evalsha"}
    assert sum(count for _, count in refusals(redis)) == 1, "a client tries it once"
    assert nursery.stop(pid) == 0
