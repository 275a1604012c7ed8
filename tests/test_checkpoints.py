"""Folders are complete or absent, whatever happens while they are written; the record's parts are verifiable."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distributed_unlearn import __version__
from distributed_unlearn.errors import ConfigError, ModelError
from distributed_unlearn.files import complete_folder, refuse_existing, set_aside, write_json, write_private
from distributed_unlearn.models.checkpoint import require_safetensors
from distributed_unlearn.provenance import hash_folder, hash_ids, new_salt, package_versions
from distributed_unlearn.report.card import model_card

ROOT = Path(__file__).resolve().parents[1]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_only_when_complete(tmp_path):
    destination = tmp_path / "new" / "result"
    with complete_folder(destination, overwrite=False) as staging:
        (staging / "a").write_text("a")
        assert not destination.exists()
        assert staging.parent == destination.parent  # a rename must not cross file systems
        assert staging.name.startswith(".")
    assert _names(destination) == ["a"] and _names(destination.parent) == ["result"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_an_error_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), complete_folder(tmp_path / "result", overwrite=False) as staging:
        (staging / "a").write_text("a")
        raise error
    assert _names(tmp_path) == []


def _existing(tmp_path: Path) -> Path:
    destination = tmp_path / "result"
    destination.mkdir()
    (destination / "old").write_text("old")
    return destination


def test_an_existing_folder_is_refused_untouched(tmp_path):
    destination = _existing(tmp_path)
    with pytest.raises(ConfigError, match="which exists.*overwrite: true"), complete_folder(destination, False):
        raise AssertionError("the block ran")
    with pytest.raises(ConfigError):
        refuse_existing(destination, overwrite=False)
    refuse_existing(destination, overwrite=True)
    refuse_existing(tmp_path / "other", overwrite=False)
    assert _names(destination) == ["old"] and _names(tmp_path) == ["result"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    destination = _existing(tmp_path)
    with complete_folder(destination, overwrite=True) as staging:
        (staging / "new").write_text("new")
        assert _names(destination) == ["old"]
    assert _names(destination) == ["new"] and _names(tmp_path) == ["result"]


def test_a_failed_overwriting_keeps_the_old(tmp_path):
    destination = _existing(tmp_path)
    with pytest.raises(ValueError, match="x"), complete_folder(destination, overwrite=True):
        raise ValueError("x")
    assert _names(destination) == ["old"] and _names(tmp_path) == ["result"]


def _no_space_for_the_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """The staging folder cannot be renamed; everything else can."""
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".writing-" in self.name:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


def test_a_failed_rename_puts_the_old_back(tmp_path, monkeypatch):
    destination = _existing(tmp_path)
    _no_space_for_the_new(monkeypatch)
    with pytest.raises(OSError, match="no space"), complete_folder(destination, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert _names(destination) == ["old"] and _names(tmp_path) == ["result"]


def _papers(tmp_path: Path, text: str) -> list[Path]:
    papers = [tmp_path / "record.salt", tmp_path / "record.json"]
    for path in papers:
        path.write_text(text)
    return papers


def test_what_tells_of_the_old_goes_aside_with_it(tmp_path):
    destination, papers = _existing(tmp_path), _papers(tmp_path, "old")
    with complete_folder(destination, True, papers) as staging:
        (staging / "new").write_text("new")
        assert all(path.read_text() == "old" for path in papers)
    assert _names(tmp_path) == ["record.previous.json", "record.previous.salt", "result"]
    # Of a run that ended between salt and record nothing displaces what is aside.
    papers[0].write_text("orphan")
    assert set_aside(papers) == [] and (tmp_path / "record.previous.salt").read_text() == "old"


@pytest.mark.parametrize("where", ["in_the_block", "at_the_rename"])
def test_what_tells_of_the_old_stays_where_the_old_stays(where, tmp_path, monkeypatch):
    destination, papers = _existing(tmp_path), _papers(tmp_path, "old")
    _no_space_for_the_new(monkeypatch)
    with pytest.raises(OSError, match="no space"), complete_folder(destination, True, papers):
        if where == "in_the_block":
            raise OSError("no space")
    assert _names(tmp_path) == ["record.json", "record.salt", "result"] and _names(destination) == ["old"]


def test_an_old_folder_that_resists_is_no_failure(tmp_path, monkeypatch, caplog):
    destination = _existing(tmp_path)

    def resist(path: Path, **settings: object) -> None:
        raise OSError(39, "Directory not empty")

    with complete_folder(destination, overwrite=True) as staging:
        (staging / "new").write_text("new")
        monkeypatch.setattr("distributed_unlearn.files.shutil.rmtree", resist)
    assert _names(destination) == ["new"]
    assert ".result.replaced-" in caplog.text and "Directory not empty" in caplog.text


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    folder = _existing(tmp_path / "disk")
    link = tmp_path / "result"
    link.symlink_to(folder)
    with complete_folder(link, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert link.is_symlink() and _names(folder) == ["new"]
    assert _names(tmp_path) == ["disk", "result"] and _names(tmp_path / "disk") == ["result"]


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "result").write_text("kept")
    with pytest.raises(ConfigError, match="is a file"), complete_folder(tmp_path / "result", overwrite=True):
        raise AssertionError("the block ran")
    assert (tmp_path / "result").read_text() == "kept"


def test_files_are_flushed_before_the_rename(tmp_path, monkeypatch):
    order: list[str] = []
    flush, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("flush"), flush(descriptor))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (order.append("rename"), rename(self, target))[1])
    with complete_folder(tmp_path / "result", overwrite=False) as staging:
        (staging / "inner").mkdir()
        (staging / "a").write_text("a")
        (staging / "inner" / "b").write_text("b")
    # Two files and two folders before, the name itself after.
    assert order == ["flush"] * 4 + ["rename", "flush"]


def test_a_kill_leaves_the_old_result(tmp_path):
    destination = _existing(tmp_path)
    program = f"""
        import time
        from pathlib import Path
        from distributed_unlearn.files import complete_folder
        with complete_folder(Path({str(destination)!r}), overwrite=True) as staging:
            (staging / "new").write_text("new")
            print("written", flush=True)
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    assert _names(destination) == ["old"]
    # The next run clears up; what another machine or a living process writes stays.
    (left,) = [name for name in _names(tmp_path) if ".writing-" in name]
    elsewhere = left.replace(f"-{process.pid}-", f"-elsewhere-{process.pid}-")
    alive = left.replace(f"-{process.pid}-", f"-{os.getpid()}-")
    for name in (elsewhere, alive):
        (tmp_path / name).mkdir()
    with complete_folder(destination, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert _names(tmp_path) == sorted([elsewhere, alive, "result"])


def test_hash_folder(tmp_path):
    for name in ("a.safetensors", "b.json", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "d.json").write_text("d")
    expected = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.safetensors", "b.json")}
    assert hash_folder(tmp_path, below=False) == expected
    assert hash_folder(tmp_path) == {**expected, "inner/d.json": hashlib.sha256(b"d").hexdigest()}
    assert hash_folder(tmp_path, (".txt",)) == {"c.txt": hashlib.sha256(b"c.txt").hexdigest()}


def test_hash_ids_can_be_verified_and_tell_no_order():
    salt, ids = new_salt(), ["b", "a", "c"]
    hashes = hash_ids(ids, salt)
    assert hashes == sorted(hashes) == hash_ids(reversed(ids), salt)
    assert set(hashes) == {hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest() for name in ids}
    assert not set(hashes) & set(hash_ids(ids, new_salt()))
    # The zero byte: salt and id cannot be shifted against each other.
    assert hash_ids(["1x"], "s") != hash_ids(["x"], "s1")
    assert len(new_salt()) == 32 and new_salt() != new_salt()


def test_package_versions_name_what_a_result_depends_on():
    import torch

    versions = package_versions()
    assert versions["torch"] == torch.__version__ or torch.__version__.startswith(versions["torch"])
    assert {"python", "distributed-unlearn", "transformers", "deepspeed", "ray"} <= versions.keys()


def test_package_versions_where_nothing_is_installed(monkeypatch):
    """As where a Ray job's working_dir carries the code."""
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("distributed_unlearn.provenance.version", missing)
    versions = package_versions()
    assert versions["distributed-unlearn"] == __version__ and versions["torch"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_has_not(value, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": value})
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"b": 1, "a": [None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None], "b": 1}


def test_private_files_are_private_from_the_start(tmp_path):
    old = os.umask(0)
    try:
        write_private(tmp_path / "salt", "secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "salt").stat().st_mode) == 0o600
    assert (tmp_path / "salt").read_text() == "secret\n"
    (tmp_path / "salt").chmod(0o644)
    write_private(tmp_path / "salt", "other")
    assert stat.S_IMODE((tmp_path / "salt").stat().st_mode) == 0o600
    assert (tmp_path / "salt").read_text() == "other\n"


@pytest.mark.parametrize("write", [write_json, write_private])
def test_a_crash_leaves_a_file_as_it_was(write, tmp_path, monkeypatch):
    write(tmp_path / "file", "old")
    before = (tmp_path / "file").read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_bytes() == before and _names(tmp_path) == ["file"]


def test_model_card():
    card = model_card("base/model", ["one", "two"])
    assert card.startswith("---\n") and "`base/model`" in card and "- one\n- two\n" in card


def test_require_safetensors(tmp_path):
    require_safetensors("owner/name")  # a hub name, checked when it is loaded
    with pytest.raises(ModelError, match="is no folder"):
        require_safetensors(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="is no folder"):
        require_safetensors("./none")
    with pytest.raises(ModelError, match="is no folder"):
        require_safetensors("runs/some/checkpoint")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        require_safetensors(str(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    require_safetensors(str(tmp_path))
