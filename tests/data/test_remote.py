"""Addresses of fsspec: files are downloaded once, whole, and again only where they have changed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalegpt.data.cache import cache_folder
from scalegpt.data.foreign.given import found_at
from scalegpt.data.remote import download
from scalegpt.data.remote.download import local_path
from scalegpt.data.remote.listing import is_address
from scalegpt.errors import InputError
from token_files import write_datatrove, write_megatron

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store() -> Iterator[Any]:
    """The file system of ``memory://``, empty."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def again(address: str) -> Path:
    """The local path, as another process would find it."""
    download.forget()
    return local_path(address)


def opened(monkeypatch: pytest.MonkeyPatch, store: Any) -> list[str]:
    """The paths of the files that are opened to read, from now on."""
    paths: list[str] = []
    real = type(store).open

    def noting(self: Any, path: str, mode: str = "rb", *rest: Any, **more: Any) -> Any:
        if mode == "rb":
            paths.append(path)
        return real(self, path, mode, *rest, **more)

    monkeypatch.setattr(type(store), "open", noting)
    return paths


@pytest.mark.parametrize("text", ["s3://bucket/a", "gs://b/c=1", "memory://x", "file:///tmp/x"])
def test_what_is_an_address(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize("text", ["a.txt", "/a/b", "a:b", "s3://a,s3://b", "hf://owner/name", "://a", "s3://"])
def test_what_is_none(text: str) -> None:
    assert not is_address(text)
    assert local_path(text) == Path(text)


def test_a_folder_is_downloaded_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "deep/b.txt", ".hidden"):
        store.pipe(f"/data/{name}", name.encode() * 100)
    paths, told = opened(monkeypatch, store), list[tuple[int, int]]()
    folder = local_path("memory://data", lambda done, total: told.append((done, total)))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")} == {"a.txt", "deep/b.txt"}
    assert (folder / "deep/b.txt").read_bytes() == b"deep/b.txt" * 100
    assert told[-1] == (1500, 1500)
    assert again("memory://data") == folder
    assert sorted(paths) == ["/data/a.txt", "/data/deep/b.txt"]
    store.pipe("/data/a.txt", b"other" * 100)
    store.rm("/data/deep/b.txt")
    assert again("memory://data") == folder
    assert sorted(paths)[-1] == "/data/deep/b.txt"
    assert len(paths) == 3
    assert [path.name for path in folder.rglob("*.txt")] == ["a.txt"]
    assert (folder / "a.txt").read_bytes() == b"other" * 100


def test_a_file_is_downloaded_again_if_its_copy_is_damaged(store: Any) -> None:
    store.pipe("/x/a.txt", b"text")
    path = local_path("memory://x/a.txt")
    assert (path.name, path.read_bytes()) == ("a.txt", b"text")
    path.write_bytes(b"tex")
    assert again("memory://x/a.txt").read_bytes() == b"text"


def test_an_interrupted_download_goes_on(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_BLOCK_BYTES", 10)
    store.pipe("/x/a.txt", bytes(range(100)))
    real, read = type(store).open, list[int]()

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, place: int) -> None:
            self.file.seek(place)

        def read(self, count: int) -> bytes:
            if len(read) == 3:
                read.append(-1)
                raise ConnectionResetError("the line is down")
            read.append(self.file.tell())
            return self.file.read(count)

    monkeypatch.setattr(type(store), "open", lambda self, *a, **o: Failing(real(self, *a, **o)))
    with pytest.raises(InputError, match=r"memory://x/a\.txt cannot be read: ConnectionResetError: the line is down"):
        local_path("memory://x/a.txt")
    assert not list(cache_folder().rglob("a.txt"))
    assert local_path("memory://x/a.txt").read_bytes() == bytes(range(100))
    assert read == [0, 10, 20, -1, *range(30, 101, 10)]
    assert not list(cache_folder().rglob("*.part"))


def test_a_rest_of_another_version_is_not_used(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe("/x/a.txt", b"old" * 100)
    path = local_path("memory://x/a.txt")
    path.with_name(f".a.txt.{'0' * 16}.part").write_bytes(b"old")
    path.unlink()
    store.pipe("/x/a.txt", b"new" * 100)
    assert again("memory://x/a.txt").read_bytes() == b"new" * 100


@pytest.mark.parametrize("size", [True, False], ids=["size", "neither"])
def test_a_server_that_tells_no_version(store: Any, monkeypatch: pytest.MonkeyPatch, size: bool) -> None:
    """Then no beginning is kept, which may be of another content; nor, without a size either, an earlier copy."""
    info = type(store).info
    known = {"name", "type", *(["size"] if size else [])}
    monkeypatch.setattr(
        type(store), "info", lambda *args: {key: value for key, value in info(*args).items() if key in known}
    )
    read = list[int]()

    def note(done: int, _: int) -> None:
        read.append(done)
        if len(read) == 2:
            raise InputError("interrupted")

    monkeypatch.setattr(download, "_BLOCK_BYTES", 10)
    store.pipe("/x/a.txt", b"old" * 10)
    with pytest.raises(InputError, match="interrupted"):
        local_path("memory://x/a.txt", note)
    store.pipe("/x/a.txt", b"new" * 10)
    assert local_path("memory://x/a.txt").read_bytes() == b"new" * 10
    store.pipe("/x/a.txt", b"two" * 10)
    assert again("memory://x/a.txt").read_bytes() == (b"new" if size else b"two") * 10


def test_files_that_belong_together(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    write_megatron(tmp_path / "there/my_document", [[[1, 2, 3]], [[4]]])
    write_datatrove(tmp_path / "there/0.ds", [[5, 6], [7]])
    (tmp_path / "there/0.txt").write_text("text")
    for name, form in (("my_document", "Megatron"), ("my_document.bin", "Megatron"), ("0.ds", "datatrove")):
        found = found_at(local_path(f"file://{tmp_path}/there/{name}"))
        assert found is not None
        assert (found.format, found.documents) == (form, 2)
    path = local_path(f"file://{tmp_path}/there/0.txt")
    assert sorted(each.name for each in path.parent.iterdir()) == [".files.json", "0.txt"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("memory://nothing", "does not exist or is empty"), ("nonsense://a", "nonsense"), ("s3://bucket/a", "s3fs|S3|Creden"),
        ("file:///nothing/here", "does not exist"),
    ],
)  # fmt: skip
def test_addresses_that_are_refused(store: Any, address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=words) as caught:
        local_path(address)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"memory://x needs the package fsspec: pip install 'scalegpt\[data\]'"):
        local_path("memory://x")


def test_two_processes_download_once(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"0123456789" * 300_000)
    program = (
        "import sys; from scalegpt.data.remote.download import local_path\n"
        f"print(local_path('file://{tmp_path}/big.txt').read_bytes() == b'0123456789' * 300_000)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert [out for out, _ in said] == ["True\n"] * 2
    assert sum("downloading 1 files" in err for _, err in said) == 1
