"""The embedded stack with its real servers; only the worker is a stand-in, as its command is injected."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import psutil
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from pipefleet_workers.fleet.local import ports as ports_module
from pipefleet_workers.fleet.local import stack as stack_module
from pipefleet_workers.fleet.local.edits import FleetEdits
from pipefleet_workers.fleet.local.errors import StackError
from pipefleet_workers.fleet.local.flower import USER
from pipefleet_workers.fleet.local.parked import Parked, parked_pools
from pipefleet_workers.fleet.local.restarts import MOST_DEATHS, PARKED_SECONDS
from pipefleet_workers.fleet.local.servers import BUCKET
from pipefleet_workers.fleet.local.stack import Stack
from tests.unit.fake_clock import Clock

READY_AND_IDLE = "import pathlib, sys, threading; pathlib.Path(sys.argv[1]).touch(); threading.Event().wait()"
READY_AND_DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY_AND_IDLE}"
NEVER_READY = "import threading; threading.Event().wait()"
SUPERVISED = """
import signal, sys
from pathlib import Path
from pipefleet_workers.fleet.local.stack import Stack
code, data = sys.argv[1:]
command = lambda pool, ready: [sys.executable, "-c", code, str(ready)]
stack = Stack(Path(data), pools=["text"], flower=False, worker_command=command)
signal.signal(signal.SIGTERM, lambda *_: stack.request_stop())
with stack:
    print(*[child.pid for child in stack._children], flush=True)
    stack.supervise()
"""


def worker(code: str) -> Callable[[str, Path], list[str]]:
    return lambda pool, ready: [sys.executable, "-c", code, str(ready)]


def plain(data: Path) -> Stack:
    return Stack(data, flower=False)


def pids(stack: Stack) -> list[int]:
    return [child.pid for child in stack._children]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def s3_client(stack: Stack, access: str | None = None, secret: str | None = None):
    config = Config(retries={"total_max_attempts": 1}, signature_version=None if access else UNSIGNED)
    return boto3.client(
        "s3",
        endpoint_url=stack.s3.endpoint,
        aws_access_key_id=access,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=config,
    )


def http_status(url: str, method: str = "GET", credentials: str | None = None, body: bytes | None = None) -> int:
    request = urllib.request.Request(url, data=body, method=method)
    if credentials:
        request.add_header("Authorization", "Basic " + b64encode(credentials.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("stack")
    fleet = data / "fleet.toml"
    fleet.touch()
    with Stack(
        data / "data",
        fleet=fleet,
        pools=["text", "text"],
        flower=False,
        worker_command=worker(READY_AND_IDLE),
    ) as running:
        yield running


def test_s3_serves_its_own_keys_and_refuses_a_second_conditional_put(stack: Stack) -> None:
    client = stack.s3.client()
    client.put_object(Bucket=BUCKET, Key="part", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refusal:
        client.put_object(Bucket=BUCKET, Key="part", Body=b"second", IfNoneMatch="*")
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=BUCKET, Key="part")["Body"].read() == b"first"


@pytest.mark.parametrize("keys", ["anonymous", "wrong secret", "unknown key"])
def test_s3_refuses_everybody_else(stack: Stack, keys: str) -> None:
    access = stack.environment()["AWS_ACCESS_KEY_ID"]
    pair = {
        "anonymous": (None, None),
        "wrong secret": (access, "wrong"),
        "unknown key": ("unknown", "wrong"),
    }[keys]
    client = s3_client(stack, *pair)
    for call in (
        lambda: client.list_objects_v2(Bucket=BUCKET),
        lambda: client.put_object(Bucket=BUCKET, Key="intruder", Body=b"x"),
    ):
        with pytest.raises(ClientError) as refusal:
            call()
        assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_s3_does_not_create_buckets_by_writing(stack: Stack) -> None:
    with pytest.raises(ClientError, match="NoSuchBucket"):
        stack.s3.client().put_object(Bucket="missing", Key="a", Body=b"x")


def test_the_inner_http_ports_take_and_give_no_data(stack: Stack) -> None:
    stack.s3.client().put_object(Bucket=BUCKET, Key="secret", Body=b"x")
    inner = {name: f"http://127.0.0.1:{stack.s3._ports[name]}" for name in ("master", "volume", "filer")}
    assert http_status(f"{inner['filer']}/buckets/{BUCKET}/secret") >= 400
    assert http_status(f"{inner['filer']}/buckets/{BUCKET}/hack", "PUT", body=b"x") >= 400
    assert http_status(f"{inner['master']}/dir/assign") >= 400
    assert http_status(f"{inner['volume']}/1,01abcdef12", "DELETE") in (401, 404)


def test_redis_wants_its_password(stack: Stack) -> None:
    port = stack.redis.port
    once = {"port": port, "protocol": 2, "retry": Retry(NoBackoff(), 0)}
    with pytest.raises(AuthenticationError, match="Authentication required"):
        Redis(**once).ping()
    with pytest.raises(AuthenticationError, match="invalid username-password"):
        Redis(**once, password="wrong").ping()
    assert Redis.from_url(stack.environment()["PIPEFLEET_REDIS_URL"]).ping()


def test_every_port_is_on_loopback(stack: Stack) -> None:
    listening = {
        connection.laddr.ip
        for pid in pids(stack)
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_secrets_are_in_no_command_line_and_in_no_readable_file(stack: Stack) -> None:
    stored = stack.data / "credentials.json"
    secrets = json.loads(stored.read_text()).values()
    lines = ["\0".join(psutil.Process(pid).cmdline()) for pid in pids(stack)]
    assert not [line for line in lines for secret in secrets if secret in line]
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert stat.S_IMODE(stack.data.stat().st_mode) == 0o700


def test_children_are_out_of_reach_of_the_terminal(stack: Stack) -> None:
    assert len(pids(stack)) == 4
    assert [os.getsid(pid) for pid in pids(stack)] == pids(stack)


def test_the_env_file_is_complete_and_private(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "pipefleet.env"
    path.write_text("old")
    path.chmod(0o644)
    stack.write_env_file(path)
    values = dict(line.split("=", 1) for line in path.read_text().splitlines())
    assert values == stack.environment()
    assert set(values) == {
        "PIPEFLEET_REDIS_URL",
        "PIPEFLEET_STORE",
        "PIPEFLEET_FLEET",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
    }
    assert values["PIPEFLEET_STORE"] == "s3://pipefleet/store/"
    assert Path(values["PIPEFLEET_FLEET"]).is_absolute()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_workers_see_this_stack_and_no_foreign_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "foreign")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://foreign")
    code = f"import json, os; print(json.dumps(dict(os.environ)), flush=True); {READY_AND_IDLE}"
    with Stack(tmp_path, pools=["text"], flower=False, worker_command=worker(code)) as running:
        seen = json.loads((tmp_path / "logs" / "worker-text-1.log").read_text())
        assert running.environment().items() <= seen.items()
    assert not {"AWS_SESSION_TOKEN", "CELERY_BROKER_URL"} & seen.keys()


def test_a_second_stack_on_the_same_data_is_refused_with_the_holders_pid(stack: Stack) -> None:
    with pytest.raises(StackError, match=f"in use by process {os.getpid()}"):
        plain(stack.data).start()
    assert all(alive(pid) for pid in pids(stack))


@pytest.mark.parametrize("same_ports", [True, False])
def test_data_credentials_and_urls_survive_a_restart(tmp_path: Path, same_ports: bool) -> None:
    bodies = {"small": b"x", "chunked": os.urandom(9_000_000)}
    with plain(tmp_path) as first:
        before = first.environment()
        Redis.from_url(first.redis.url).set("key", "value")
        for key, body in bodies.items():
            first.s3.client().put_object(Bucket=BUCKET, Key=key, Body=body)
    if not same_ports:
        (tmp_path / "ports.json").unlink()
    with plain(tmp_path) as second:
        assert Redis.from_url(second.redis.url).get("key") == b"value"
        for key, body in bodies.items():
            assert second.s3.client().get_object(Bucket=BUCKET, Key=key)["Body"].read() == body
        second.s3.client().put_object(Bucket=BUCKET, Key="third", Body=b"new")
        assert second.s3.client().get_object(Bucket=BUCKET, Key="small")["Body"].read() == b"x"
        assert (second.environment() == before) is same_ports
        assert second.environment()["AWS_SECRET_ACCESS_KEY"] == before["AWS_SECRET_ACCESS_KEY"]


def test_stop_leaves_no_process_and_no_file_outside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    stack = Stack(tmp_path / "data", pools=["a"], flower=False, worker_command=worker(READY_AND_IDLE))
    stack.start()
    mine = pids(stack)
    sockets = [Path(c.laddr) for pid in mine for c in psutil.Process(pid).net_connections("unix") if c.laddr]
    assert sockets
    sockets.append(Path(f"/tmp/seaweedfs-admin-grpc-{os.getpid()}.sock"))  # of a port that SeaweedFS chose by itself
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(sockets[-1]))
    # A server that does not end when asked is killed and cannot tidy up after itself.
    os.kill(stack.s3.child.pid, signal.SIGSTOP)
    stack.stop()
    stack.stop()
    assert not [pid for pid in mine if alive(pid)]
    assert not [path for path in sockets if path.is_absolute() and path.exists()]
    assert list(home.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["data"]
    with pytest.raises(StackError, match="not running"):
        stack.environment()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], list[int]]]]:
    started: list[subprocess.Popen[str]] = []
    children: list[int] = []

    def start(code: str) -> tuple[subprocess.Popen[str], list[int]]:
        command = [sys.executable, "-c", SUPERVISED, code, str(tmp_path / "data")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        mine = [int(pid) for pid in process.stdout.readline().split()]
        children.extend(mine)
        return process, mine

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    for survivor in filter(alive, children):
        os.kill(survivor, signal.SIGKILL)


def test_kill_9_of_the_parent_leaves_no_child_and_the_data_usable(supervised, tmp_path: Path) -> None:
    parent, children = supervised(READY_AND_DEAF)
    assert len(children) == 3
    assert all(alive(pid) for pid in children)
    parent.kill()
    with plain(tmp_path / "data") as successor:
        assert not [pid for pid in children if alive(pid)]
        successor.s3.client().put_object(Bucket=BUCKET, Key="after", Body=b"x")


def test_sigterm_ends_a_supervised_stack_cleanly(supervised) -> None:
    parent, children = supervised(READY_AND_IDLE)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 0
    assert not [pid for pid in children if alive(pid)]


def test_an_interrupt_during_the_start_stops_what_was_started(supervised, tmp_path: Path) -> None:
    # SIGTERM handled as Ctrl-C is: a shell may have told this process, and so its children, to ignore SIGINT.
    code = SUPERVISED.replace("lambda *_: stack.request_stop()", "signal.default_int_handler")
    command = [sys.executable, "-c", code, NEVER_READY, str(tmp_path / "data")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        assert eventually((tmp_path / "data/logs/worker-text-1.log").exists)
        children = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(timeout=30) != 0
    assert children
    assert not [child for child in children if alive(child.pid)]


def test_a_dead_server_ends_the_supervision_with_its_name(tmp_path: Path) -> None:
    with plain(tmp_path) as stack:
        os.kill(stack.redis.child.pid, signal.SIGKILL)
        with pytest.raises(StackError, match=r"redis was killed by SIGKILL; the end of .*redis\.log"):
            stack.supervise()


def test_a_pool_whose_worker_keeps_ending_takes_no_other_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    code = f"""
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
while "worker-text" not in sys.argv[1] or not pathlib.Path({str(broken)!r}).exists():
    time.sleep(0.01)
sys.exit("the model exploded")
"""
    clock = Clock()
    pools = ["text", "image"]
    with Stack(tmp_path / "data", pools=pools, flower=False, worker_command=worker(code), clock=clock) as stack:
        others = pids(stack)
        broken.touch()

        def parked() -> dict[str, Parked]:
            clock.now += 1.0
            stack.step()
            return parked_pools(Redis.from_url(stack.redis.url))

        assert eventually(lambda: bool(parked()), 60)
        assert parked() == {"text": Parked(1, 1, "worker-text-1 exited with status 1: the model exploded")}
        assert [pid for pid in others if not alive(pid)] == [others[2]]
        assert stack.silent_pools == ["text"]
        broken.unlink()
        clock.now += PARKED_SECONDS
        assert eventually(lambda: not parked())
        assert stack.silent_pools == []
    said = capfd.readouterr().err
    assert said.count("worker-text-1 exited with status 1; the end of ") == MOST_DEATHS
    assert said.count("starting it again in ") == MOST_DEATHS - 1
    assert "and stays down" in said


def followed(folder: Path, code: str, *pools: str) -> Stack:
    """A stack that follows a fleet file with a pool for each name; every worker runs `code` with its pool and its ready file."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    tables = [f'[pools.{pool}]\ntask = "text-classification"\nmodel = "./model"\n' for pool in pools]
    (folder / "fleet.toml").write_text("default = true\n".join(tables))
    return Stack(folder / "data", flower=False, worker_command=worker(code)).follow(FleetEdits(folder / "fleet.toml"))


def test_at_the_start_one_pool_that_does_not_load_takes_no_other_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = f"import sys\nif 'worker-bad' in sys.argv[1]: sys.exit('no such model')\n{READY_AND_IDLE}"
    with followed(tmp_path, code, "bad", "good") as stack:
        assert stack.silent_pools == ["bad"]
    said = capfd.readouterr().err
    assert re.search(
        r"worker-bad-1 exited with status 1(.|\n)*no such model\n.*worker-bad-1: starting it again in 1 s", said
    )


def test_a_start_with_no_pool_that_loads_fails(tmp_path: Path) -> None:
    stack = followed(tmp_path, "raise SystemExit('no such model')", "bad", "worse")
    with pytest.raises(StackError, match=r"worker-bad-1 exited with status 1(.|\n)*no such model"):
        stack.start()
    assert pids(stack) == []


def test_a_slow_pool_is_told_and_left_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stack_module, "WORKER_SECONDS", 3.0)
    code = f"import sys, threading\nif 'worker-slow' in sys.argv[1]: threading.Event().wait()\n{READY_AND_IDLE}"
    with followed(tmp_path, code, "slow", "good") as stack:
        assert stack.silent_pools == ["slow"]
    assert "worker-slow-1 is not ready after 3 s" in capfd.readouterr().err


def test_a_reload_reads_the_fleet_file_at_once(tmp_path: Path) -> None:
    with followed(tmp_path, READY_AND_IDLE, "one") as stack:
        followed(tmp_path, READY_AND_IDLE, "one", "two")
        stack.request_reload()
        stack.step()
        assert stack.silent_pools == ["two"]
        assert eventually(lambda: not stack.silent_pools)
        assert stack.environment()["PIPEFLEET_FLEET"] == str(tmp_path / "fleet.toml")


def test_a_worker_that_ends_before_it_is_ready_fails_the_start(tmp_path: Path) -> None:
    stack = Stack(tmp_path, pools=["text"], flower=False, worker_command=worker("raise SystemExit('no such model')"))
    with pytest.raises(StackError, match=r"worker-text-1 exited with status 1(.|\n)*no such model"):
        stack.start()


def test_a_worker_that_is_not_ready_in_time_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "WORKER_SECONDS", 0.3)
    stack = Stack(tmp_path, pools=["text"], flower=False, worker_command=worker(NEVER_READY))
    with pytest.raises(StackError, match=r"not ready after 0\.3 s: worker-text-1"):
        stack.start()
    assert pids(stack) == []
    with plain(tmp_path):
        pass


def test_a_port_lost_between_choice_and_bind_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with plain(tmp_path) as stack:
        redis_port, s3_port = stack.redis.port, stack.s3._ports["s3"]
    honest = ports_module.is_free
    with socket.create_server(("127.0.0.1", redis_port)), socket.create_server(("127.0.0.1", s3_port)):
        monkeypatch.setattr(ports_module, "is_free", lambda port: port in (redis_port, s3_port) or honest(port))
        with plain(tmp_path) as stack:
            assert stack.redis.port != redis_port
            assert stack.s3._ports["s3"] != s3_port


def test_the_systems_redis_serves_when_asked_for(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on PATH")
    with Stack(tmp_path, flower=False, redis_binary="redis-server") as stack:
        assert psutil.Process(stack.redis.child.pid).name() == "redis-server"
        assert "redis_version" in Redis.from_url(stack.redis.url).info()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no program no-such-server"):
        Stack(tmp_path, flower=False, redis_binary="no-such-server").start()


def test_flower_asks_for_its_password_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_flower_app.py").write_text("from celery import Celery\napp = Celery('tiny')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    monkeypatch.setattr(stack_module, "FLOWER_APP", "tiny_flower_app:app")
    with Stack(tmp_path / "data") as stack:
        url, credentials = stack.flower.url, f"{USER}:{stack.flower.password}"
        lines = psutil.Process(stack.flower.child.pid).cmdline()
        assert not [line for line in lines if stack.flower.password in line]
        assert [http_status(f"{url}{page}") for page in ("", "tasks", "api/workers")] == [401] * 3
        assert http_status(url, credentials=f"{USER}:wrong") == 401
        assert [http_status(f"{url}{page}", credentials=credentials) for page in ("", "tasks")] == [200] * 2
        shutdown = f"{url}api/worker/shutdown/nobody"
        assert http_status(shutdown, "POST", credentials, b"") == 403
        listening = {c.laddr.ip for c in psutil.Process(stack.flower.child.pid).net_connections("tcp") if not c.raddr}
        assert listening == {"127.0.0.1"}
    assert list((tmp_path / "data/flower").glob("state*"))
