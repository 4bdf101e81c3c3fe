"""Conversions that are killed, or meet a full disk: nothing half-written under the final name, and the same command
goes on."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron import files
from dapo_megatron.conversion import command
from dapo_megatron.conversion.command import convert
from dapo_megatron.conversion.options import Options
from dapo_megatron.conversion.workspace import finished_bytes, open_workspace, workspace_folder
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.learner.manifest import check_manifest
from dapo_megatron.resharding.hf_layout import SINGLE
from tests.command_line import ROOT, environment
from tests.tiny_models import write_model

LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")

# the command line, in a process that kills itself in the middle of its N-th file
KILLED = """
import os, signal, sys
from dapo_megatron.conversion import streams
write, paths, last = streams.HashedFile.write, [], int(sys.argv.pop(1))
def write_or_die(self, data):
    if self.path not in paths:
        paths.append(self.path)
    count = write(self, data)
    if len(paths) == last and self.bytes > 2000:
        os.kill(os.getpid(), signal.SIGKILL)
    return count
streams.HashedFile.write = write_or_die
from dapo_megatron.cli import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "hf", "llama", tied=False)


def run_process(code, *arguments, limit_bytes=None):
    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, preexec_fn=limit,
    )  # fmt: skip


def assert_converted(folder, model):
    """The checkpoint is whole and holds the model."""
    check_manifest(folder)
    back = folder.with_name("back")
    convert("megatron-to-hf", folder, back)
    found, expected = load_file(back / SINGLE), load_file(model / SINGLE)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model):
    """What a conversion leaves that was killed in the middle of its third of four files."""
    root = tmp_path_factory.mktemp("killed")
    result = run_process(KILLED, 3, "convert", "hf-to-megatron", model, root / "out", *LAYOUT)
    assert result.returncode == -signal.SIGKILL, result.stderr
    return root


@pytest.fixture
def left(killed, tmp_path):
    """A copy of it; its destination is tmp_path/out."""
    return shutil.copytree(workspace_folder(killed / "out"), workspace_folder(tmp_path / "out"))


def test_going_on_after_a_kill(tmp_path, model, killed, left, capsys):
    assert [p.name for p in killed.iterdir()] == [left.name]
    assert left.name.startswith(".")
    shards = left / "content" / "shards"
    assert sorted(p.name for p in shards.iterdir()) == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    kept = {name: (shards / name).stat().st_mtime_ns for name in ("__0_0.distcp", "__1_0.distcp")}
    convert("hf-to-megatron", model, tmp_path / "out", LAYOUT)
    told = capsys.readouterr().out
    assert "reuses 2 of 4 files" in told
    assert "verified" in told
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert kept == {name: (tmp_path / "out" / "shards" / name).stat().st_mtime_ns for name in kept}
    assert_converted(tmp_path / "out", model)


def test_a_folder_of_safetensors_goes_on_too(tmp_path, model, capsys):
    request = ["convert", "hf-to-hf", model, tmp_path / "out", "--file-size", "100KB"]
    assert run_process(KILLED, 4, *request).returncode == -signal.SIGKILL
    convert("hf-to-hf", model, tmp_path / "out", options=Options(file_size=100_000))
    assert "reuses 3 of" in capsys.readouterr().out
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found.update(load_file(path))
    expected = load_file(model / SINGLE)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["content", "size", "journal"])
def test_a_finished_file_that_is_not_whole_is_written_again(tmp_path, model, left, capsys, what):
    path = left / "content" / "shards" / "__1_0.distcp"
    if what == "journal":  # as if killed while writing a line
        journal = left / "journal.jsonl"
        journal.write_text(journal.read_text()[:-30])
    else:
        content = bytearray(path.read_bytes())
        content[3000] ^= 1
        path.write_bytes(content if what == "content" else content[:-1])
    convert("hf-to-megatron", model, tmp_path / "out", LAYOUT)
    assert "reuses 1 of 4 files" in capsys.readouterr().out
    assert_converted(tmp_path / "out", model)


@pytest.mark.parametrize("what", ["layout", "dtype", "source"])
def test_another_request_starts_anew(tmp_path, model, left, capsys, what):
    layout = ("parallel.tensor=4",) if what == "layout" else LAYOUT
    options = Options(dtype="bf16") if what == "dtype" else Options()
    times = (model / SINGLE).stat()
    try:
        if what == "source":
            os.utime(model / SINGLE, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
        convert("hf-to-megatron", model, tmp_path / "out", layout, options)
    finally:
        os.utime(model / SINGLE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "reuses" not in capsys.readouterr().out
    if what != "dtype":
        assert_converted(tmp_path / "out", model)


def test_a_file_that_may_not_grow_further(tmp_path, model):
    request = ["convert", "hf-to-megatron", model, tmp_path / "out", *LAYOUT]
    # the journal and the first files stay below, no shard does
    result = run_process("from dapo_megatron.cli import main; main()", *request, limit_bytes=60_000)
    assert result.returncode == 1, result.stderr
    assert "out/shards/__0_0.distcp" in result.stderr
    assert "bytes" in result.stderr and "same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    convert("hf-to-megatron", model, tmp_path / "out", LAYOUT)
    assert_converted(tmp_path / "out", model)


def test_a_full_disk(tmp_path, model, monkeypatch, capsys):
    """/dev/full takes nothing, as a disk that somebody else has filled after the check."""

    def open_full(path, *arguments, **options):
        return open("/dev/full" if path.name == "__3_0.distcp" else path, *arguments, **options)

    monkeypatch.setattr(files, "open", open_full, raising=False)
    with pytest.raises(RunError, match=r"out/shards/__3_0\.distcp: No space left .* same command again"):
        convert("hf-to-megatron", model, tmp_path / "out", LAYOUT)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert("hf-to-megatron", model, tmp_path / "out", LAYOUT)
    assert "reuses 3 of 4 files" in capsys.readouterr().out
    assert_converted(tmp_path / "out", model)


def test_room_is_counted_without_the_finished_files(tmp_path):
    request = {"kind": "any"}
    with open_workspace(tmp_path / "out", request) as workspace:
        (workspace.content / "a").write_bytes(b"12345")
        workspace.record("a", bytes=5, sha256="x")
    assert finished_bytes(tmp_path / "out", request) == 5
    assert finished_bytes(tmp_path / "out", {"kind": "other"}) == 0
    assert finished_bytes(tmp_path / "elsewhere", request) == 0


def test_two_at_once(tmp_path, model):
    folder = workspace_folder(tmp_path / "out")
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(RequestError, match="another process is converting"):
            convert("hf-to-hf", model, tmp_path / "out")
    finally:
        os.close(lock)
    convert("hf-to-hf", model, tmp_path / "out")


def test_a_destination_that_appears_meanwhile_is_left_alone(tmp_path, model, monkeypatch):
    finish = command.HuggingFaceTarget.finish

    def intrude(self, workspace):
        finish(self, workspace)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")

    monkeypatch.setattr(command.HuggingFaceTarget, "finish", intrude)
    with pytest.raises(RunError, match="appeared meanwhile"):
        convert("hf-to-hf", model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_source_that_shrinks_meanwhile(tmp_path, monkeypatch):
    model = write_model(tmp_path / "hf", "llama", tied=False)
    opened = command.open_hugging_face

    def shrink(folder):
        source = opened(folder)
        content = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(content[: len(content) // 2])
        return source

    monkeypatch.setattr(command, "open_hugging_face", shrink)
    with pytest.raises(RunError, match="was it changed meanwhile"):
        convert("hf-to-hf", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_journal_lines_are_json(tmp_path):
    with open_workspace(tmp_path / "out", {"kind": "any"}) as workspace:
        save_file({"a": torch.zeros(1)}, workspace.content / "a")
        workspace.record("a", bytes=1, sha256="0", pieces=[[0, 5]])
    lines = [json.loads(line) for line in (workspace.folder / "journal.jsonl").read_text().splitlines()]
    assert lines == [{"request": {"kind": "any"}}, {"file": "a", "bytes": 1, "sha256": "0", "pieces": [[0, 5]]}]
