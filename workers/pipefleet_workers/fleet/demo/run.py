"""The demonstration: a whole fleet on this machine, and two real bulk jobs through it, from a bucket back to the bucket.

`command` calls `run_demo` with a data directory; the models, the fleet file and the stack's data go there. It prints results and
the next steps, and returns the exit code. UsageError: a package is missing. StackError: the local stack does not start.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from pipefleet.client import Client
from pipefleet.errors import UsageError
from pipefleet.printable import printable
from pipefleet.runs.progress import RunProgress
from pipefleet.runs.run import Run
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.demo import assets, weights
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack

SAMPLES = "s3://pipefleet/samples/"
FLEET = """\
# Written by `pipefleet demo`; `pipefleet up --fleet {path}` serves the same models.
[pools.speech]
task = "automatic-speech-recognition"
model = "{speech}"
# Greedy instead of transformers' default of five beams: a few words differ, at a third of the time.
parameters = {{ generate_kwargs = {{ num_beams = 1 }} }}

[pools.embeddings]
task = "feature-extraction"
model = "{embeddings}"
parameters = {{ pooling = "mean", normalize = true, truncation = true }}
"""


def run_demo(data: Path, *, stay: bool) -> int:
    """Start the fleet, run both jobs, print their results. With `stay`, keep the fleet up until Ctrl-C.

    Returns the exit code: 1 when an item failed. Raises UsageError when the demo packages are missing.
    """
    print("Preparing the models (Whisper tiny.en and all-MiniLM-L6-v2, from packages) ...", flush=True)
    fleet = write_fleet(data)
    begin = time.monotonic()
    print("Starting Redis, S3, two workers and Flower ...", flush=True)
    with suppress(KeyboardInterrupt), Stack(data, fleet=fleet, pools=["speech", "embeddings"]) as stack:
        print(f"Ready after {time.monotonic() - begin:.1f} s.", flush=True)
        stack.write_env_file(data / "env")
        with in_environment(stack.environment()), Client() as client:
            failed = _run_jobs(client)
        _say_how_to_go_on(stack, data)
        if stay:
            print("\nThe fleet stays up. Ctrl-C stops it.", flush=True)
            stack.supervise()
        return int(failed > 0)
    return 0


def write_fleet(data: Path) -> Path:
    """The demo's fleet file under `data`, with its models prepared. Raises UsageError when a package is missing."""
    data.mkdir(parents=True, exist_ok=True)
    try:
        speech, embeddings = weights.whisper_tiny_en(data.absolute() / "models"), weights.minilm()
    except weights.DemoPackageMissing as error:
        raise UsageError(str(error)) from None
    path = data / "fleet.toml"
    path.write_text(FLEET.format(path=path, speech=speech, embeddings=embeddings))
    return path


def upload_samples(store: ObjectStore) -> tuple[str, str]:
    """Copy the sample media to the bucket. Returns the prefix of the recordings and the URI of the manifest of texts."""
    for path in assets.recordings():
        store.put(f"{SAMPLES}audio/{path.name}", path.read_bytes(), content_type="audio/*")
    for path in assets.pictures():
        store.put(f"{SAMPLES}pictures/{path.name}", path.read_bytes(), content_type="image/*")
    store.put(f"{SAMPLES}texts.jsonl", assets.texts().read_bytes(), content_type="application/x-ndjson")
    return f"{SAMPLES}audio/", f"{SAMPLES}texts.jsonl"


def _run_jobs(client: Client) -> int:
    audio, texts = upload_samples(client.store)
    output = f"s3://pipefleet/demo/{time.strftime('%Y%m%d-%H%M%S')}"
    print(f"\nSpeech recognition of {audio}", flush=True)
    speech = client.map("automatic-speech-recognition", audio, output=f"{output}/transcripts/")
    heard = speech.wait(progress=True)
    print(f"\nEmbeddings of {texts}", flush=True)
    embeddings = client.map("feature-extraction", texts, output=f"{output}/embeddings/")
    embedded = embeddings.wait(progress=True)
    _show_transcripts(speech)
    _show_totals([(speech, heard), (embeddings, embedded)])
    return heard.failed + embedded.failed


def _show_transcripts(run: Run, *, count: int = 4) -> None:
    print("\nSome transcripts:")
    for row in [row for row in run.results() if "output" in row][:count]:
        name, text = printable(row["id"].rsplit("/", 1)[-1]), printable(row["output"]["text"].strip(), 90)
        print(f"  {name:>20}  {text}")


def _show_totals(runs: list[tuple[Run, RunProgress]]) -> None:
    print("\nResults, a line of JSON for each item:")
    for run, ended in runs:
        rate = ended.items / ended.seconds
        print(f"  {run.uri}part-*.jsonl  {ended.succeeded} of {ended.items} items, {rate:.1f} items/s")


def _say_how_to_go_on(stack: Stack, data: Path) -> None:
    print("\nTo look around:")
    if stack.flower is not None:
        print(f"  Flower    {stack.flower.url}  (user pipefleet, password {stack.flower.password})")
    print(f"  shell     set -a; . {data / 'env'}; set +a   then: pipefleet queues, pipefleet doctor")
    example = json.dumps(f"{SAMPLES}audio/alice-03.flac")
    print(f"  Python    pipefleet.pipeline('automatic-speech-recognition')({example})")
    print(
        f"  later     pipefleet up --fleet {data / 'fleet.toml'} --data {data}   (the bucket and its results are kept)"
    )
