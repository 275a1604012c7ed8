"""A disk that is full or may not be written is one clear error; a scratch folder does not outlast a kill for long."""

import errno
import os
import signal
import tempfile

import pytest

from distributed_unlearn import cli
from distributed_unlearn.errors import ResourceError
from distributed_unlearn.files import scratch_folder, unwritable


class SafetensorError(Exception):
    """Named as the library's."""


@pytest.mark.parametrize(
    ("error", "texts"),
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), ("'/a/b'", "No space left on device")),
        (PermissionError(errno.EACCES, "x", "/a/b"), ("'/a/b'", "Permission denied")),
        (OSError(errno.EROFS, "x"), ("a file that", "Read-only file system")),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), ("File too large",)),
    ],
)
def test_what_the_disk_refuses_is_one_clear_error(monkeypatch, capsys, error, texts):
    def refused(arguments, console):
        raise error

    monkeypatch.setattr(cli, "_dispatch", refused)
    assert cli.main(["plan", "none.yaml"]) == ResourceError.exit_code
    written = capsys.readouterr().err
    assert written.startswith("error (resources): got ") and written.count("\n") == 3
    assert all(text in written for text in texts)


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), ValueError("os error 28"), KeyError(28)])
def test_other_errors_are_bugs_of_ours(monkeypatch, error):
    assert unwritable(error) is None
    monkeypatch.setattr(cli, "_dispatch", lambda arguments, console: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        cli.main(["plan", "none.yaml"])


def test_a_scratch_folder_is_ones_own_and_what_a_killed_process_left_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if (child := os.fork()) == 0:
        with scratch_folder() as folder:
            (folder / "rows").write_text("secret")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder() as folder, scratch_folder() as other:
        assert {folder, other} == set(tmp_path.iterdir()) and folder.stat().st_mode & 0o777 == 0o700
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
