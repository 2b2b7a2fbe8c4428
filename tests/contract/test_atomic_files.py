"""A file is wholly there or not at all, whatever is killed when."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from carpool.errors import FolderError
from carpool.files import make_folder, sha256_of_file, write_atomically

WRITER = """
import sys
from pathlib import Path
from carpool.files import write_atomically
path, size = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomically(path, bytes([letter]) * size)
"""


def test_kill_9_never_leaves_half_a_file(tmp_path: Path) -> None:
    """A process that rewrites a file is killed at random moments; the file is always whole."""
    path = tmp_path / "state"
    size = 200_000
    whole = {letter * size for letter in (b"a", b"b")}
    moments = random.Random(0)  # noqa: S311  moments, not secrets
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(size)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content in whole
        path.unlink()


def test_the_usual_mask_applies(tmp_path: Path) -> None:
    """Whoever sets it to 077 gets files for themselves alone."""
    script = (
        "import os, sys; from pathlib import Path; os.umask(0o077); "
        "from carpool.files import write_atomically; write_atomically(Path(sys.argv[1]), b'x'); "
        "print(oct(os.umask(0o022)))"
    )
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert done.stdout == "0o77\n"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A file in its place, or in its parent's."""
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(FolderError) as caught:
            make_folder(path)
        assert str(caught.value).startswith(
            f"{path}: expected a folder, or a place where one can be made, got: "
        )
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_the_new_content_is_there_on_return(tmp_path: Path) -> None:
    """Empty content and replacement included; nothing stray is left."""
    path = tmp_path / "state"
    for content in (b"one", b"", b"two" * 1000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for example: the old bytes stay and the half-written file goes."""
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_content_and_name_are_synced_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content before the rename, the directory after it: else a power cut leaves zeros."""
    events = []
    sync, replace = os.fsync, Path.replace

    def log_sync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("directory" if is_directory else "content")
        sync(descriptor)

    def log_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(Path, "replace", log_replace)
    write_atomically(tmp_path / "state", b"x")
    assert events == ["content", "rename", "directory"]


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o644)])
def test_a_private_file_is_the_owners_alone(tmp_path: Path, *, private: bool, mode: int) -> None:
    """A sampling key must not be readable by other accounts."""
    path = tmp_path / "state"
    write_atomically(path, b"x", private=private)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hash_in_pieces_equals_the_hash(tmp_path: Path, size: int) -> None:
    """Around the piece's size."""
    path = tmp_path / "file"
    content = bytes(i % 251 for i in range(size))
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()
