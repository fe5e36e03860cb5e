"""`fleet.toml`: what is read from it, and an error for every way to get it wrong."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.errors import FleetFileError, UnknownModelError
from pipefleet.fleet.file import load_fleet, parse_fleet, with_revision
from pipefleet.fleet.pools import Fleet, Pool, WorkerRange, model_label, pinned

POOL = '[pools.speech]\ntask = "automatic-speech-recognition"\nmodel = "/models/whisper"\n'
OTHER = POOL.replace("speech]", "ctc]").replace("whisper", "ctc")
HUB = '[pools.hub]\ntask = "text-classification"\nmodel = "org/name"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fleet.toml"


def read(file: Path, content: str, *, allow_unpinned: bool = False) -> Fleet:
    file.write_text(content, encoding="utf-8")
    return load_fleet(file, allow_unpinned=allow_unpinned)


def test_every_key_is_read(file: Path) -> None:
    pool = read(
        file,
        """
[pools.speech]
task = "automatic-speech-recognition"
model = "openai/whisper-tiny.en"
revision = "87c7102"
default = true
tokenizer = "./tokenizer"
device = "cuda:1"
device_map = "auto"
dtype = "bfloat16"
parameters = { return_timestamps = true }
max_batch_cost = 4000
max_batch_items = 8
workers = { min = 1, max = 20 }
wait_slo = 60
trust_remote_code = true
processor = "org/processor@5b1d8f4"
max_memory = { 0 = "20GiB", cpu = "1.5GB" }
offload_folder = "../offload"
compile = true
quantization = { method = "bitsandbytes", load_in_4bit = true }
attn_implementation = "sdpa"
model_kwargs = { variant = "fp16" }
previous = { model = "openai/whisper-tiny", revision = "169d4a4" }
""",
    ).pool("speech")
    assert replace(pool, previous=()) == Pool(
        "speech", "automatic-speech-recognition", "openai/whisper-tiny.en", "87c7102", True,
        str(file.parent.resolve() / "tokenizer"), "cuda:1", "auto", "bfloat16", {"return_timestamps": True}, 4000, 8,
        WorkerRange(1, 20), 60.0, True, "org/processor@5b1d8f4", {"0": "20GiB", "cpu": "1.5GB"},
        str(file.parent.resolve().parent / "offload"), True,
        {"method": "bitsandbytes", "load_in_4bit": True}, "sdpa", {"variant": "fp16"},
    )  # fmt: skip
    (retired,) = pool.previous
    told = {"model": "openai/whisper-tiny", "revision": "169d4a4", "workers": WorkerRange(0, 20), "generation": 1}
    assert retired == replace(pool, previous=(), **told)
    announced = ("queue", "revision_queue", "generation")  # see below
    elsewhere = ("devices", "workers_per_device")  # these take the place of `device`: see test_devices
    keys = [one for one in fields(Pool) if one.name not in announced + elsewhere]
    assert all(getattr(pool, one.name) != one.default for one in keys), "a key without a test of its own"


def test_what_is_left_out_has_a_default(file: Path) -> None:
    pool = read(file, POOL + 'max_batch_cost = "auto"\n').pool("speech")
    assert pool == Pool("speech", "automatic-speech-recognition", "/models/whisper")


def test_a_task_may_be_named_by_its_alias(file: Path) -> None:
    fleet = read(file, HUB.replace("text-classification", "sentiment-analysis") + 'revision = "1"\n')
    assert fleet.pool("hub").task == "text-classification"


@pytest.mark.parametrize("model", ["./whisper", "../models/whisper"])
def test_a_relative_folder_is_relative_to_the_file(file: Path, model: str) -> None:
    pool = read(file, POOL.replace("/models/whisper", model)).pool("speech")
    assert pool.model == str((file.parent / model).resolve())
    assert not pool.is_hub


@pytest.mark.parametrize("model", ["/models/x", "./x", "~/x", "s3://models/x/"])
def test_only_a_hub_name_needs_a_revision(file: Path, model: str) -> None:
    assert not read(file, HUB.replace("org/name", model)).pool("hub").is_hub
    with pytest.raises(
        FleetFileError, match=r"pools\.hub: model 'org/name' has no revision; pin one.*--allow-unpinned"
    ):
        read(file, HUB)
    with pytest.raises(FleetFileError, match="has no revision"):
        read(file, HUB.replace("org/name", "name-without-a-slash"))
    assert read(file, HUB, allow_unpinned=True).pool("hub").revision is None
    assert read(file, HUB + 'revision = "5b1d8f4"\n').pool("hub").revision == "5b1d8f4"


WRONG = [
    ("", r"describes no pool; add a table \[pools\.NAME\]"),
    ("pools = 3", "describes no pool"),
    ("[pool.x]", r"unknown key 'pool' \(did you mean 'pools'\?\)"),
    ("[pools.x", "cannot read the fleet file"),
    (POOL + POOL, "cannot read the fleet file"),
    ("[pools]\nspeech = 3", r"pools\.speech must be a table"),
    (POOL.replace("speech]", "Speech]"), r"pools\.Speech: a pool's name has 1 to 63 of a-z"),
    (POOL.replace("speech]", '"a.b"]'), "a pool's name has"),
    (POOL.replace("task", "tsk"), r"pools\.speech has an unknown key 'tsk' \(did you mean 'task'\?\); known are"),
    (POOL + "max_batch_size = 3", r"unknown key 'max_batch_size' \(did you mean 'max_batch_"),
    (POOL + "name = 'x'", "unknown key 'name'"),
    ('[pools.x]\ntask = "text-classification"', r"pools\.x lacks model"),
    ('[pools.x]\nmodel = "/m"', r"pools\.x lacks task"),
    (POOL + "queue = 'x'", "unknown key 'queue'"),
    (POOL.replace("recognition", "recogniton"), r"pools\.speech: .*did you mean 'automatic-speech-recognition'\?"),
    (POOL.replace('"/models/whisper"', "3"), r"pools\.speech\.model must be a text"),
    (POOL.replace('"/models/whisper"', '""'), r"pools\.speech\.model must be a text"),
    (POOL + "task = 3", "cannot read"),
    (POOL + "revision = 5", r"pools\.speech\.revision must be a text"),
    (POOL + 'default = "yes"', r"pools\.speech\.default must be true or false"),
    (POOL + "trust_remote_code = 1", r"pools\.speech\.trust_remote_code must be true or false"),
    (POOL + 'device = "gpu"', r"pools\.speech\.device must be auto, cpu or cuda:N"),
    (POOL + 'device = "cuda:"', r"pools\.speech\.device"),
    (POOL + 'device_map = "balanced"', r"pools\.speech\.device_map must be auto"),
    (POOL + 'dtype = "float8"', r"pools\.speech\.dtype must be one of auto, float32, float16, bfloat16"),
    (POOL + "parameters = 3", r"pools\.speech\.parameters must be a table"),
    (POOL + "parameters = { return_timestamp = true }", r"pools\.speech: .*did you mean 'return_timestamps'\?"),
    (POOL + 'max_memory = { cpu = "1GB" }', r"pools\.speech\.max_memory must be left out, or beside device_map"),
    (POOL + 'offload_folder = "/x"', r"pools\.speech\.offload_folder must be left out, or beside device_map"),
    (POOL + 'device_map = "auto"\nmax_memory = "1GB"', r"pools\.speech\.max_memory must be a table like"),
    (POOL + 'device_map = "auto"\nmax_memory = { cpu = 3 }', r"pools\.speech\.max_memory must be a table like"),
    (POOL + 'device_map = "auto"\nmax_memory = { gpu = "1GB" }', r"pools\.speech\.max_memory must be a table like"),
    (POOL + 'device_map = "auto"\nmax_memory = { cpu = "much" }', r"pools\.speech\.max_memory must be a table like"),
    (POOL + 'tokenizer = "org/name"', r"tokenizer 'org/name' has no revision; write it as org/name@REVISION"),
    (POOL + 'processor = "org/name@"', r"processor 'org/name@' has no revision"),
    (POOL + "max_batch_cost = 0", r"pools\.speech\.max_batch_cost must be a whole number above 0"),
    (POOL + "max_batch_cost = 1.5", r"pools\.speech\.max_batch_cost"),
    (POOL + 'max_batch_items = "auto"', r"pools\.speech\.max_batch_items must be a whole number above 0"),
    (POOL + "max_batch_items = true", r"pools\.speech\.max_batch_items"),
    (POOL + "wait_slo = -1", r"pools\.speech\.wait_slo must be a number above 0"),
    (POOL + "wait_slo = nan", r"pools\.speech\.wait_slo"),
    (POOL + "workers = 3", r"pools\.speech\.workers must be a table like \{ min = 0, max = 20 \}"),
    (POOL + "workers = { min = 1, maximum = 2 }", r"pools\.speech\.workers has an unknown key 'maximum'.*'max'"),
    (POOL + "workers = { min = 3, max = 2 }", r"pools\.speech\.workers must be whole numbers with 0 <= min <= max"),
    (POOL + "workers = { max = 0 }", r"pools\.speech\.workers must be whole numbers"),
    (POOL + "workers = { min = -1 }", r"pools\.speech\.workers must be whole numbers"),
    (POOL + "workers = { max = 2.5 }", r"pools\.speech\.workers must be whole numbers"),
    (POOL + OTHER, "pools ctc, speech all serve automatic-speech-recognition; mark one of them with default = true"),
    (POOL + "default = true\n" + OTHER + "default = true", "pools ctc, speech are all the default of.*; keep one"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_key_and_the_file(file: Path, content: str, message: str) -> None:
    with pytest.raises(FleetFileError, match=message) as caught:
        read(file, content)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match=r"no fleet file .*none\.toml; name one with --fleet or PIPEFLEET_FLEET"):
        load_fleet(tmp_path / "none.toml")
    with pytest.raises(FleetFileError, match="cannot read the fleet file"):
        load_fleet(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(file: Path) -> None:
    file.write_bytes(b'[pools.x]\nmodel = "\xff"')
    with pytest.raises(FleetFileError, match="cannot read the fleet file"):
        load_fleet(file)


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([one.name for one in fields(Pool)]) | st.text(max_size=6), VALUES, max_size=4))
def test_no_value_of_any_key_raises_anything_else(table: dict[str, object]) -> None:
    from pipefleet.errors import UsageError
    from pipefleet.fleet.file import parse_fleet

    content = {"pools": {"x": {"task": "text-classification", "model": "/m", **table}}}
    try:
        fleet = parse_fleet(content, base=Path("/"))
    except UsageError:
        return
    assert isinstance(fleet.pool("x"), Pool)


def test_a_part_beside_its_model_shares_its_revision_and_another_has_its_own(file: Path) -> None:
    assert read(file, HUB + 'revision = "1"\ntokenizer = "org/name"').pool("hub").tokenizer == "org/name"
    assert pinned("org/other@5b1d8f4") == ("org/other", "5b1d8f4")
    assert pinned("./folder@2") == ("./folder@2", None)
    assert pinned("s3://bucket/model@2/") == ("s3://bucket/model@2/", None)


def test_pools_are_found_by_name_task_and_model(file: Path) -> None:
    fleet = read(file, POOL + "default = true\n" + OTHER + 'revision = "1"\n')
    assert fleet.pool("ctc") is fleet.find("automatic-speech-recognition", "/models/ctc", "1")
    assert fleet.pool("ctc") is fleet.find("automatic-speech-recognition", "/models/ctc", None)
    assert fleet.default_pool("automatic-speech-recognition") is fleet.pool("speech")


def test_what_is_not_served_is_refused_with_a_list_of_what_is(file: Path) -> None:
    fleet = read(file, POOL + 'revision = "1"\n')
    served = r"served are: automatic-speech-recognition: /models/whisper@1"
    with pytest.raises(UnknownModelError, match=rf"serves /models/none for automatic-speech-recognition; {served}"):
        fleet.find("automatic-speech-recognition", "/models/none", None)
    with pytest.raises(UnknownModelError, match="serves /models/whisper@2 for"):
        fleet.find("automatic-speech-recognition", "/models/whisper", "2")
    with pytest.raises(UnknownModelError, match=rf"no pool of the fleet serves image-classification; {served}"):
        fleet.default_pool("image-classification")
    with pytest.raises(FleetFileError, match=r"no pool 'speach' \(did you mean 'speech'\?\); its pools: speech"):
        fleet.pool("speach")
    with pytest.raises(UnknownModelError, match="is a worker running"):
        Fleet({}).default_pool("image-classification")


def test_what_a_later_version_announces_is_passed_over() -> None:
    fields = {"task": "text-classification", "model": "org/a", "queue": "pipefleet.x", "later": {"version": 3}}
    assert Pool.announced("a", fields) == Pool("a", "text-classification", "org/a", queue="pipefleet.x")


def test_a_pool_announces_what_is_needed_to_route_to_it() -> None:
    pool = Pool("speech", "automatic-speech-recognition", "org/name", "1", default=True)
    assert Pool(name="speech", **pool.to_json()) == pool
    assert model_label("org/name", "1") == "org/name@1"
    assert model_label("/models/x", None) == "/models/x"


@pytest.mark.parametrize("wrong", ["a\nb", "/models/\x1b[2J", "/models/\u2028", "m" * 1025])
@pytest.mark.parametrize("key", ["model", "revision"])
def test_a_model_that_no_job_can_name_is_refused(key: str, wrong: str) -> None:
    table = {"task": "text-classification", "model": "/m", "revision": "r", key: wrong}
    with pytest.raises(FleetFileError, match=f"pools.a.{key} must be a text of 1 to 1024 characters without control"):
        parse_fleet({"pools": {"a": table}}, base=Path("/"))
    previous = {**table, "previous": {"model": "/o", key: wrong}, key: "/right"}
    with pytest.raises(FleetFileError, match=f"pools.a.previous.{key} must be"):
        parse_fleet({"pools": {"a": previous}}, base=Path("/"))
    with pytest.raises(FleetFileError, match=f"--{key} must be"):
        with_revision(Pool("a", "text-classification", "/m"), **{"model": "/m", "revision": "r", key: wrong})


def test_a_model_by_name_is_that_of_the_default_pool_where_two_pools_load_it_differently() -> None:
    table = {"task": "text-classification", "model": "/models/x"}
    pools = {"half": {**table, "dtype": "float16"}, "whole": {**table, "dtype": "float32", "default": True}}
    fleet = parse_fleet({"pools": pools}, base=Path("/"))
    assert fleet.find("text-classification", "/models/x", None).name == "whole"
    pools["whole"] |= {"model": "/models/y", "previous": {"model": "/models/x"}}
    other = parse_fleet({"pools": pools}, base=Path("/"))
    assert other.find("text-classification", "/models/x", None).name == "half"
    assert other.idle_pools() == {}


def test_a_pool_that_gets_no_jobs_is_named() -> None:
    table = {"task": "text-classification", "model": "/models/x", "revision": "1"}
    pools = {
        "half": {**table, "dtype": "float16"},
        "whole": {**table, "default": True},
        "new": {**table, "revision": "2"},
    }
    (sentence,) = parse_fleet({"pools": pools}, base=Path("/")).idle_pools().values()
    assert sentence.startswith(
        "pool half gets no jobs: those for /models/x@1 go to the pool whole, which serves it for"
    )


def test_a_job_goes_to_a_pool_of_its_model_before_one_that_is_leaving_it() -> None:
    table = {"task": "text-classification", "model": "/models/x"}
    moving = {**table, "model": "/models/y", "previous": {"model": "/models/x"}, "default": True}
    pools = {"moving": moving, "staying": table}
    fleet = parse_fleet({"pools": pools}, base=Path("/"))
    assert fleet.find("text-classification", "/models/x", None).key == "staying"
    assert fleet.find("text-classification", "/models/y", None).key == "moving"
