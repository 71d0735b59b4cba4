"""Pull and import, against a server on this machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.model_files import (
    BAD_NAMES,
    CONFIGS,
    CONTENTS,
    DATA,
    FILES,
    NAMES,
    SAMPLE,
    config_of,
    flip,
    import_own,
    put,
)
from trtseg import modelinstall
from trtseg.errors import DownloadError, ModelError, OutputError, UsageError
from trtseg.modelinstall import import_folder
from trtseg.models import DEMO, IMPORTED_NOTICE, PUBLISHED, ModelSet, find_models, verify

PATIENCE_S = 60.0
BDN_DATA = FILES[1]


class Server(ThreadingHTTPServer):
    """Serves CONTENTS, but for the paths that have an answer of their own; keeps a log."""

    daemon_threads = False  # so that closing the server waits for its threads and their sockets

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.log: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.removeprefix("/")
        self.server.log.append(path)
        try:
            self.server.answers.get(path, lambda handler: handler.send(CONTENTS[path]))(self)
        except ConnectionError:
            self.close_connection = True  # the client was killed, or gave up

    def send(self, body: bytes, length: int | None = -1, status: int = 200) -> None:
        """Answer with `body`; `length` is the Content-Length, None for no such header."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of checkpoints, not made yet."""
    monkeypatch.setenv("TRTSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home" / "checkpoints"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield one
        finally:
            one.shutdown()
            thread.join()


@pytest.fixture
def no_pooch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any use of the downloader an ImportError."""
    monkeypatch.setitem(sys.modules, "pooch", None)


def pull(server: Server, **options: object) -> ModelSet:
    return modelinstall.pull(base_url=server.url, files=FILES, **options)  # type: ignore[arg-type]


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.suffix == ".part"]


def assert_whole(root: Path) -> None:
    folder = root / PUBLISHED
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert all(check.ok for check in verify(find_models(), FILES))
    assert leftovers(root) == []


# Pull


def test_a_default_pull_asks_for_the_pinned_commit() -> None:
    assert (
        f"{modelinstall.PUBLISHED_URL}/{BDN_DATA.path}"
        == "https://raw.githubusercontent.com/afetit/fetal-mri-segmentation/"
        "409a7bf1d71e1bf7f2abc33dcb19bb56d88226ff/fetal-segmentation-system/"
        "bdn/checkpoint/bdn.model.ckpt.data-00000-of-00001"
    )


def test_pull(server: Server, root: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    got = pull(server, progress=lambda *step: steps.append(step))
    assert (got.name, got.kind, got.folder, got.notice) == (
        PUBLISHED,
        "published",
        root / PUBLISHED,
        "",
    )
    assert server.log == [file.path for file in FILES]
    assert_whole(root)
    assert find_models() == find_models(PUBLISHED) == got
    for file in FILES:
        counts = [done for name, done, size in steps if (name, size) == (file.name, file.size)]
        assert counts == sorted(counts)
        assert counts[-1] == file.size
    assert len(steps) > len(FILES)


def test_pull_accepts_a_url_that_ends_in_a_slash(server: Server, root: Path) -> None:
    modelinstall.pull(base_url=f"{server.url}/", files=FILES)
    assert_whole(root)


def test_pulled_files_are_readable_as_the_umask_says(server: Server, root: Path) -> None:
    before = os.umask(0o027)
    try:
        pull(server)
    finally:
        os.umask(before)
    assert (root / PUBLISHED).stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (root / PUBLISHED).iterdir()} == {0o640}


def test_pull_again_asks_for_nothing(server: Server, root: Path, no_pooch: None) -> None:
    put(root / PUBLISHED, flat=True)
    said: list[str] = []
    pull(server, report=said.append)
    assert server.log == []
    assert len(said) == 1
    assert "already" in said[0]
    # Not even a lock: whoever may only read a shared set gets the same answer.
    assert list(root.iterdir()) == [root / PUBLISHED]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        pytest.param(
            lambda handler: handler.send(CONTENTS[BDN_DATA.path][:-5], BDN_DATA.size),
            "IncompleteRead",
            id="truncated",
        ),
        pytest.param(
            lambda handler: handler.send(CONTENTS[BDN_DATA.path][:-5], None),
            f"{BDN_DATA.size - 5} bytes",
            id="short without a length",
        ),
        pytest.param(
            lambda handler: handler.send(CONTENTS[BDN_DATA.path] + b"more", None),
            f"more than {BDN_DATA.size} bytes",
            id="long",
        ),
        pytest.param(
            lambda handler: handler.send(CONTENTS[BDN_DATA.path][:-1] + b"\0"),
            ": git blob SHA-1",
            id="corrupted",
        ),
        pytest.param(
            lambda handler: handler.send(b"nowhere", status=404), "HTTP status 404", id="404"
        ),
        pytest.param(
            lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
            "Connection aborted",
            id="hung up",
        ),
        pytest.param(
            lambda handler: handler.wfile.write(
                b"HTTP/1.0 302 Found\r\nLocation: ftp://127.0.0.1/x\r\n\r\n"
            ),
            "ftp",
            id="sent elsewhere",
        ),
    ],
)
def test_a_failed_pull_leaves_nothing_and_can_be_repeated(
    server: Server, root: Path, answer: Callable[[Handler], None], found: str
) -> None:
    server.answers[BDN_DATA.path] = answer
    with pytest.raises(DownloadError) as caught:
        pull(server)
    message = str(caught.value)
    assert found in caught.value.found
    assert caught.value.found.startswith(f"{BDN_DATA.name} from {server.url}/{BDN_DATA.path}: ")
    assert BDN_DATA.blob_sha1 in message
    assert str(BDN_DATA.size) in message
    assert "trtseg models import DIR" in message
    assert "\n" not in message
    assert visible(root) == []
    assert leftovers(root) == []
    with pytest.raises(ModelError, match="not here"):
        find_models()

    server.answers.clear()
    pull(server)
    assert_whole(root)


def test_connection_refused(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(DownloadError, match="Connection refused") as caught:
        modelinstall.pull(base_url=f"http://127.0.0.1:{port}", files=FILES)
    assert f"http://127.0.0.1:{port}/{FILES[0].path}" in str(caught.value)
    assert visible(root) == []


def test_a_server_that_does_not_answer(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelinstall, "_TIMEOUT_S", 0.1)
    over = threading.Event()

    def stall(_: Handler) -> None:
        over.wait(PATIENCE_S)

    server.answers[FILES[0].path] = stall
    try:
        with pytest.raises(DownloadError, match="timed out"):
            pull(server)
    finally:
        over.set()
    assert visible(root) == []


def test_an_interrupted_pull_leaves_nothing_and_can_be_repeated(server: Server, root: Path) -> None:
    def interrupt(name: str, done: int, size: int) -> None:
        if name == BDN_DATA.name and done < size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(server, progress=interrupt)
    assert server.log[-1] == BDN_DATA.path
    assert visible(root) == []
    assert leftovers(root) == []
    pull(server)
    assert_whole(root)


def test_a_killed_pull_leaves_nothing_that_counts(server: Server, root: Path) -> None:
    started, over = threading.Event(), threading.Event()

    def stall(handler: Handler) -> None:
        handler.send(CONTENTS[BDN_DATA.path][:-1], BDN_DATA.size)
        started.set()
        over.wait(PATIENCE_S)

    server.answers[BDN_DATA.path] = stall
    script = (
        "import json, sys\n"
        "from trtseg.modelinstall import pull\n"
        "from trtseg.models import PublishedFile\n"
        "pull(base_url=sys.argv[1],"
        " files=tuple(PublishedFile(*row) for row in json.loads(sys.argv[2])))\n"
    )
    table = json.dumps([[file.path, file.blob_sha1, file.size] for file in FILES])
    process = subprocess.Popen([sys.executable, "-c", script, server.url, table])
    try:
        assert started.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        over.set()
    assert visible(root) == []
    assert len(leftovers(root)) == 1
    with pytest.raises(ModelError, match="not here"):
        find_models()

    server.answers.clear()
    pull(server)
    assert_whole(root)


def pull_in_thread(
    server: Server, results: list[object], report: Callable[[str], None] | None = None
) -> threading.Thread:
    def work() -> None:
        try:
            results.append(pull(server, report=report))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must see it
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_of_two_pulls_the_second_waits_and_finds_the_set(server: Server, root: Path) -> None:
    started, waiting = threading.Event(), threading.Event()

    def slow(handler: Handler) -> None:
        started.set()
        waiting.wait(PATIENCE_S)
        handler.send(CONTENTS[FILES[0].path])

    server.answers[FILES[0].path] = slow
    results: list[object] = []
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        waiting.set()

    first = pull_in_thread(server, results)
    assert started.wait(PATIENCE_S)
    second = pull_in_thread(server, results, report)
    first.join()
    second.join()
    assert results == [find_models()] * 2
    assert len(said) == 2
    assert "waiting" in said[0]
    assert "already" in said[1]
    assert server.log == [file.path for file in FILES]
    assert_whole(root)


def test_two_pulls_on_a_file_system_without_locks(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    root.mkdir(parents=True)
    foreign = root / f".{PUBLISHED}~another.part"
    foreign.mkdir()
    both = threading.Barrier(2)

    def together(handler: Handler) -> None:
        both.wait(PATIENCE_S)
        handler.send(CONTENTS[FILES[-1].path])

    server.answers[FILES[-1].path] = together
    results: list[object] = []
    threads = [pull_in_thread(server, results) for _ in range(2)]
    for thread in threads:
        thread.join()
    assert results == [find_models()] * 2
    assert foreign.is_dir(), "it may belong to a live process"
    foreign.rmdir()
    assert_whole(root)


def test_leftovers_of_another_set_are_left_alone(server: Server, root: Path) -> None:
    other = root / f".{PUBLISHED}.2~live.part"
    other.mkdir(parents=True)
    pull(server)
    assert other.is_dir()


def test_pull_repairs_a_damaged_set_with_the_damaged_file(server: Server, root: Path) -> None:
    folder = put(root / PUBLISHED, flat=True)
    flip(folder / BDN_DATA.name)
    (folder / "NOTES").write_text("kept")
    untouched = {name: (folder / name).stat().st_ino for name in NAMES if name != BDN_DATA.name}
    pull(server)
    assert server.log == [BDN_DATA.path]
    assert {name: (folder / name).stat().st_ino for name in untouched} == untouched
    assert (folder / "NOTES").read_text() == "kept"
    (folder / "NOTES").unlink()
    assert_whole(root)


def test_pull_completes_a_set(server: Server, root: Path) -> None:
    folder = put(root / PUBLISHED, flat=True)
    (folder / NAMES[0]).unlink()
    (folder / NAMES[3]).write_bytes(b"")
    pull(server)
    assert server.log == [FILES[0].path, FILES[3].path]
    assert_whole(root)


def test_pull_replaces_a_set_of_wrong_files(server: Server, root: Path) -> None:
    folder = put(root / PUBLISHED, flat=True)
    for name in NAMES:
        flip(folder / name)
    pull(server)
    assert_whole(root)


def test_a_failed_repair_changes_nothing(server: Server, root: Path) -> None:
    folder = put(root / PUBLISHED, flat=True)
    for name in NAMES[1:]:
        flip(folder / name)
    before = {name: (folder / name).read_bytes() for name in NAMES}
    server.answers[FILES[3].path] = lambda handler: handler.send(b"", status=500)
    with pytest.raises(DownloadError, match="HTTP status 500"):
        pull(server)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert leftovers(root) == []


def test_a_set_deleted_during_its_repair_is_not_half_restored(server: Server, root: Path) -> None:
    folder = put(root / PUBLISHED, flat=True)
    flip(folder / BDN_DATA.name)

    def delete(handler: Handler) -> None:
        shutil.rmtree(folder)
        handler.send(CONTENTS[BDN_DATA.path])

    server.answers[BDN_DATA.path] = delete
    with pytest.raises(OutputError, match="No such file"):
        pull(server)
    assert visible(root) == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/path",
        "file:///path",
        "/path",
        "http://",
        "http://[::1/path",
        "https://user:secret@host/path",
        "https://host/path?token=secret",
        "https://host/path#secret",
    ],
)
def test_pull_refuses_a_url_it_cannot_use(url: str, root: Path, no_pooch: None) -> None:
    with pytest.raises(UsageError) as caught:
        modelinstall.pull(base_url=url, files=FILES)
    assert "secret" not in str(caught.value)
    assert not root.exists()


def test_pull_where_nothing_can_be_written(server: Server, root: Path) -> None:
    root.parent.mkdir()
    root.write_text("a file")
    with pytest.raises(OutputError):
        pull(server)
    assert server.log == []


def test_pull_where_a_file_has_the_name_of_the_set(server: Server, root: Path) -> None:
    root.mkdir(parents=True)
    (root / PUBLISHED).write_text("a file")
    with pytest.raises(OutputError, match=str(root / PUBLISHED)):
        pull(server)
    assert (root / PUBLISHED).read_text() == "a file"
    assert leftovers(root) == []


def test_a_lock_of_another_user_is_enough(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir(parents=True)
    (root / f".{PUBLISHED}~lock").touch()
    real = os.open

    def refuse_writing(path: str, flags: int, *rest: int, **options: int) -> int:
        if str(path).endswith("~lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse_writing)
    pull(server)
    assert_whole(root)


def test_a_full_disk_is_no_fault_of_the_network(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.RawIOBase):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    real = modelinstall._Receiver.__init__

    def on_full_disk(self: modelinstall._Receiver, _: object, *rest: object) -> None:
        real(self, FullDisk(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(modelinstall._Receiver, "__init__", on_full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        pull(server)
    assert visible(root) == []
    assert leftovers(root) == []


# Import of the published set


@pytest.mark.parametrize(
    ("flat", "below"), [(True, ""), (False, ""), (False, "fetal-segmentation-system")]
)
def test_import_published(
    tmp_path: Path, root: Path, flat: bool, below: str, no_pooch: None
) -> None:
    put(tmp_path / "in" / below, flat=flat, configs=("bdn", "cgm"))
    got = import_folder(tmp_path / "in", files=FILES)
    assert got.name == PUBLISHED
    assert_whole(root)
    assert got.config("bdn") is None


def test_import_published_again(tmp_path: Path, root: Path) -> None:
    source = put(tmp_path / "in", flat=True)
    import_folder(source, files=FILES)
    flip(root / PUBLISHED / NAMES[2])
    import_folder(source, files=FILES)
    assert_whole(root)
    said: list[str] = []
    import_folder(source, files=FILES, report=said.append)
    assert "already" in said[0]
    assert_whole(root)


@pytest.mark.parametrize("same_size", [True, False])
def test_import_refuses_a_wrong_file(tmp_path: Path, root: Path, same_size: bool) -> None:
    source = put(tmp_path / "in", flat=False)
    wrong = source / BDN_DATA.path
    if same_size:
        flip(wrong)
    else:
        wrong.write_bytes(wrong.read_bytes() + b"x")
    with pytest.raises(ModelError, match="--unpublished") as caught:
        import_folder(source, files=FILES)
    assert caught.value.found.startswith(f"{wrong}: ")
    assert BDN_DATA.blob_sha1 in str(caught.value)
    assert visible(root) == []
    assert leftovers(root) == []


def test_import_refuses_the_real_index_beside_wrong_data(tmp_path: Path, root: Path) -> None:
    source = put(tmp_path / "in", flat=True)
    for index in (DATA / "published").iterdir():
        shutil.copy(index, source)
    with pytest.raises(ModelError, match=r"bdn\.model\.ckpt\.data.*24781072 bytes"):
        import_folder(source)
    assert visible(root) == []


@pytest.mark.parametrize("options", [{}, {"unpublished": True, "name": "own"}])
@pytest.mark.parametrize("flat", [True, False])
def test_import_names_a_missing_file(
    tmp_path: Path, root: Path, flat: bool, options: dict[str, object]
) -> None:
    source = put(tmp_path / "in", flat=flat)
    absent = source / (BDN_DATA.name if flat else BDN_DATA.path)
    absent.unlink()
    with pytest.raises(ModelError) as caught:
        import_folder(source, files=FILES, **options)  # type: ignore[arg-type]
    assert caught.value.found == f"not there: {absent}"
    assert not root.exists()


def test_import_of_a_folder_that_is_not_there(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ModelError, match=NAMES[0]):
        import_folder(tmp_path / "nowhere", files=FILES)
    assert not root.exists()


def test_import_refuses_to_choose_between_two_sets(tmp_path: Path, root: Path) -> None:
    source = put(put(tmp_path / "in", flat=True), flat=False)
    with pytest.raises(ModelError, match="2 sets"):
        import_folder(source, files=FILES)
    assert not root.exists()


@pytest.mark.parametrize("options", [{"name": "own"}, {"config": Path("model.cfg")}])
def test_import_of_the_published_set_takes_no_options(
    tmp_path: Path, root: Path, options: dict[str, object]
) -> None:
    source = put(tmp_path / "in", flat=True)
    with pytest.raises(UsageError, match="--unpublished"):
        import_folder(source, files=FILES, **options)  # type: ignore[arg-type]
    assert not root.exists()


# Import of other sets


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("configs", [(), ("cgm",), ("bdn", "cgm")])
def test_import_unpublished(
    tmp_path: Path, root: Path, flat: bool, configs: tuple[str, ...], no_pooch: None
) -> None:
    source = put(tmp_path / "in", flat=flat, configs=configs)
    got = import_own(source)
    assert (got.name, got.kind, got.folder) == ("own", "imported", root / "own")
    assert got.notice == IMPORTED_NOTICE
    assert got == find_models("own")
    for net in ("bdn", "cgm"):
        config = got.config(net)
        assert (config is not None) == (net in configs)
        assert config is None or config.read_bytes() == config_of(net)
        assert got.checkpoint(net) == got.folder / f"{net}.model.ckpt"
    stored = {path.name: path.read_bytes() for path in got.files()}
    assert stored == {
        Path(path).name: content
        for path, content in CONTENTS.items()
        | {CONFIGS[net]: config_of(net) for net in configs}.items()
    }
    record = json.loads((got.folder / "record.json").read_text())
    assert record == {
        "format": 1,
        "name": "own",
        "source": "plain files" if flat else "published layout",
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in stored.items()
        },
    }
    assert [check.path for check in verify(got)] == list(got.files())
    assert all(check.ok for check in verify(got))
    assert leftovers(root) == []


def test_import_stores_a_given_config_for_both_networks(tmp_path: Path) -> None:
    source = put(tmp_path / "in", flat=False, configs=("bdn", "cgm"))
    config = tmp_path / "other.cfg"
    config.write_bytes(SAMPLE.replace(b"\n", b"\r\n"))
    got = import_own(source, config=config)
    for net in ("bdn", "cgm"):
        stored = got.config(net)
        assert stored is not None
        assert stored.read_bytes() == config.read_bytes()


def test_import_names_a_config_that_is_not_there(tmp_path: Path, root: Path) -> None:
    source = put(tmp_path / "in", flat=True)
    with pytest.raises(ModelError, match=r"absent\.cfg: No such file"):
        import_own(source, config=tmp_path / "absent.cfg")
    assert not root.exists()


@pytest.mark.parametrize("given", [True, False])
def test_import_refuses_a_config_out_of_scope(tmp_path: Path, root: Path, given: bool) -> None:
    source = put(tmp_path / "in", flat=True, configs=("bdn", "cgm"))
    wrong = tmp_path / "other.cfg" if given else source / "cgm_model_config.cfg"
    wrong.write_bytes(SAMPLE.replace(b'"prelu"', b'"elu"'))
    with pytest.raises(ModelError, match="activationFunction"):
        import_own(source, config=wrong if given else None)
    assert not root.exists()


def test_import_of_the_same_weights_again(tmp_path: Path) -> None:
    source = put(tmp_path / "in", flat=True, configs=("bdn",))
    got = import_own(source)
    before = {path.name: path.stat().st_ino for path in got.folder.iterdir()}
    said: list[str] = []
    again = import_own(put(tmp_path / "in2", flat=False, configs=("bdn",)), report=said.append)
    assert again == got
    assert "same" in said[0]
    assert {path.name: path.stat().st_ino for path in got.folder.iterdir()} == before


@pytest.mark.parametrize("change", ["source", "config", "stored", "record"])
def test_import_does_not_replace_a_set(tmp_path: Path, root: Path, change: str) -> None:
    source = put(tmp_path / "in", flat=True, configs=("bdn",))
    got = import_own(source)
    if change == "source":
        flip(source / NAMES[3])
    elif change == "config":
        (source / Path(CONFIGS["bdn"]).name).unlink()
    elif change == "stored":
        flip(got.folder / NAMES[3])
    else:
        (got.folder / "record.json").unlink()
    before = {path.name: path.read_bytes() for path in got.folder.iterdir()}
    with pytest.raises(ModelError, match=f"delete {got.folder}"):
        import_own(source)
    assert {path.name: path.read_bytes() for path in got.folder.iterdir()} == before
    assert leftovers(root) == []


def test_import_from_the_place_of_the_set_itself(root: Path) -> None:
    folder = put(root / "own", flat=True)
    with pytest.raises(ModelError, match="move it elsewhere"):
        import_own(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", [*BAD_NAMES, PUBLISHED, DEMO, "Published", "DEMO", None])
def test_import_refuses_a_name(tmp_path: Path, root: Path, name: str | None) -> None:
    source = put(tmp_path / "in", flat=True)
    with pytest.raises(UsageError, match="--name"):
        import_folder(source, unpublished=True, name=name)
    assert not root.exists()


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "My_Net-2.1", "published2"])
def test_import_accepts_a_name(tmp_path: Path, root: Path, name: str) -> None:
    import_own(put(tmp_path / "in", flat=True), name)
    assert visible(root) == [name]
