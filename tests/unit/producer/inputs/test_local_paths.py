"""What stands at a local path may be no file, or none that may be read: each is one sentence, and nothing waits for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipefleet.cli.jobs import _input
from pipefleet.client import Client
from pipefleet.errors import InputError, SourceError
from pipefleet.inputs.sources import FolderSource, ManifestSource, open_source
from pipefleet.tasks import task_spec

PICTURES, TEXTS = "image-classification", "text-classification"
LONG = "/" + "a" * 300 + " and so on"


def source(client: Client, name: Path | str) -> Any:
    spec = task_spec(PICTURES)
    return open_source(name, spec, client.store, client.preparer(spec), output="s3://pipefleet/out/")


def test_a_pipe_or_a_device_among_the_inputs_is_refused_and_not_waited_for(client: Client, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "m.jsonl").write_text(
        f'{{"inputs": "{tmp_path}/a.png"}}\n{{"inputs": "/dev/zero"}}\n{{"inputs": ""}}\n'
    )
    found = source(client, tmp_path / "m.jsonl")
    found.check()
    reasons = [item.failure for item in found.items(0, None)]
    for reason, words in zip(reasons, ("a pipe, not a file", "a device, not a file", "names no file"), strict=True):
        assert words in reason
    with pytest.raises(InputError, match="a pipe, not a file"):
        client.preparer(task_spec(PICTURES)).prepare(tmp_path / "a.png")


def test_the_pipe_of_a_shell_is_read(client: Client) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"content")
    os.close(writer)
    path = _input(task_spec(TEXTS), f"/dev/fd/{reader}")
    reference = client.preparer(task_spec(TEXTS)).prepare(path)
    os.close(reader)
    assert client.store.get(reference["$ref"]) == b"content"


def test_a_text_that_looks_like_a_path_stays_one_however_long_it_is() -> None:
    assert _input(task_spec(TEXTS), LONG) == LONG


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (LONG, "no such source"),
        ("m.jsonl\0", "no such source"),
        ("pipe.jsonl", "no file that can be read twice: give"),
        ("a.png", "is no manifest: give"),
        ("broken.jsonl", "no such source"),
    ],
)
def test_what_is_no_source_is_told_in_one_sentence(client: Client, tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo("pipe.jsonl")
    Path("a.png").write_bytes(b"x")
    Path("broken.jsonl").symlink_to("nowhere")
    with pytest.raises(SourceError, match=message):
        source(client, name)


def test_a_manifest_or_a_folder_that_may_not_be_read_is_named(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"inputs": "a"}\n')
    found = source(client, manifest)
    assert isinstance(found, ManifestSource)
    manifest.unlink()
    with pytest.raises(SourceError, match=r"cannot read the manifest .*m\.jsonl: No such file"):
        found.check()

    (tmp_path / "folder/locked").mkdir(parents=True)
    (tmp_path / "folder/a.png").write_bytes(b"x")
    opened = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(os, "scandir", refusing)
    folder = source(client, tmp_path / "folder")
    assert isinstance(folder, FolderSource)
    with pytest.raises(SourceError, match=r"cannot read the folder .*locked: Permission denied"):
        folder.check()


def test_a_source_that_nobody_may_look_at_is_named(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Any, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refused)
        with pytest.raises(SourceError, match=r"cannot be read \(Permission denied\)"):
            source(client, tmp_path / "locked/m.jsonl")
