"""A catalogue that does not describe the shards is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import fsspec
import pytest

from bifrost.data import DataError, catalogue_state, open_dataset, verify, write_shard
from bifrost.data.catalogue import NAME
from bifrost.data.make_catalogue import make_catalogues
from bifrost.data.remote import ListingPage, list_page
from catalogued_folder import RENEWAL, content, is_catalogued, write
from thread_ranks import in_ranks


def replaced(folder: Path, make_image) -> None:
    write_shard(folder / "s-00001.tar", [("other", {"png": make_image(99), "txt": b"x"})])


def same_size(folder: Path, make_image) -> None:
    """The same sizes of shard and index: only the content differs."""
    import json

    index = folder / "s-00001.index.jsonl"
    header, _, rest = index.read_text().partition("\n")
    values = json.loads(header)
    values["sha256"] = values["sha256"][::-1]
    index.write_text(f"{json.dumps(values)}\n{rest}")
    os.utime(index, (1, 1))  # the clock of file times is coarse


def added(folder: Path, make_image) -> None:
    write_shard(folder / "s-00001-b.tar", [("other", {"png": make_image(99), "txt": b"x"})])


def removed(folder: Path, make_image) -> None:
    (folder / "s-00003.tar").unlink()
    (folder / "s-00003.index.jsonl").unlink()


@pytest.mark.parametrize("change", [replaced, same_size, added, removed])
def test_stale_catalogue_is_refused(served, folder, make_image, change) -> None:
    _, address, upload = served
    write(address, folder, upload)
    if not address.startswith(("http", str(folder))):
        with fsspec.open(address + NAME) as file:
            (folder / NAME).write_bytes(file.read())
    change(folder, make_image)
    upload()
    spec = address + "s-*.tar"
    if address.startswith(("http", "memory")) and change in (replaced, same_size):  # seen when the shard is read
        with pytest.raises(DataError, match="stale: .*" + RENEWAL):
            content(open_dataset(spec))
    else:
        with pytest.raises(DataError, match="stale: s-0000.*" + RENEWAL) as caught:
            open_dataset(spec)
        assert "\n" not in str(caught.value)

        def refused(rank, gather) -> bool:
            with pytest.raises(DataError, match="stale: s-0000.*" + RENEWAL):
                open_dataset(spec, rank=rank, gather=gather)
            return True

        assert all(in_ranks(refused, 3))
    if change is not same_size:  # which is an altered index
        (problem,) = verify(spec)
        assert f"stale: s-0000{'3' if change is removed else '1'}" in problem
    write(address, folder, upload)
    assert is_catalogued(spec)


def one_file(folder: str, after: str, token: str | None) -> ListingPage:
    """A page of a listing with one file."""
    files = list_page(folder, token or after).files
    return ListingPage(dict([*files.items()][:1]), next(iter(files)) if len(files) > 1 else None)


def test_shards_added_that_a_wildcard_includes(served, folder, make_image, monkeypatch) -> None:
    """Also ones far from the others, and none that it does not include. The listing has one file per page."""
    _, address, upload = served
    monkeypatch.setattr(catalogue_state, "list_page", one_file)
    make_catalogues(str(folder))
    upload()
    included = address + "s-*0.tar", address + "s-*[02].tar"
    excluded = address + "s-0000*.tar", [address + "s-00000.tar", address + "s-00003.tar"]
    assert all(is_catalogued(spec) for spec in (*included, *excluded))
    write_shard(folder / "s-10000.tar", [("other", {"png": make_image(99), "txt": b"x"})])
    upload()
    for spec in included:
        with pytest.raises(DataError, match="stale: s-10000.tar was added" + RENEWAL):
            open_dataset(spec)
    assert all(is_catalogued(spec) for spec in excluded)


def test_files_written_again_with_equal_content_are_no_reason_to_refuse(folder, caplog) -> None:
    make_catalogues(str(folder))
    expected = content(open_dataset(str(folder)))
    caplog.clear()
    os.utime(folder / "s-00002.tar", (1, 1))
    assert content(open_dataset(str(folder))) == expected
    (line,) = [each.message for each in caplog.records]
    assert "1 shards or indexes were written again" in line


@pytest.mark.parametrize("served", ["s3"], indirect=True)  # HTTP has no states, and the others are written in place
def test_a_copy_on_other_storage_needs_no_new_catalogue(served, folder, monkeypatch) -> None:
    _, address, upload = served
    expected = content(open_dataset(address))
    make_catalogues(str(folder))
    upload()
    monkeypatch.setattr("bifrost.data.catalogued.open_header", lambda shard, *_: pytest.fail(f"{shard} was opened"))
    assert content(open_dataset(address)) == expected


def test_damaged_catalogue_is_refused(folder) -> None:
    make_catalogues(str(folder))
    data = (folder / NAME).read_bytes()
    for broken in (b"", data[:-1], data[:600], data + b"x", data[:-3] + b"\0" + data[-2:], b"{}\n", b"[]\n" + data):
        (folder / NAME).write_bytes(broken)
        with pytest.raises(DataError, match="damaged catalogue" + RENEWAL):
            open_dataset(str(folder))
        assert "damaged catalogue" in verify(str(folder))[0]
    (folder / NAME).write_bytes(data.replace(b'"version": 1', b'"version": 2', 1))
    with pytest.raises(DataError, match="catalogue version 2, expected 1" + RENEWAL):
        open_dataset(str(folder))


def test_shard_changed_after_the_opening_is_named(folder, make_image) -> None:
    make_catalogues(str(folder))
    dataset = open_dataset(str(folder))
    replaced(folder, make_image)
    with pytest.raises(DataError, match=r"stale: .*s-00001.index.jsonl was changed" + RENEWAL):
        dataset.read(1, 0)


def test_ranks_with_different_catalogues_are_refused(folder, tmp_path) -> None:
    """Such as copies on the nodes' own disks."""
    copy = tmp_path / "copy"
    make_catalogues(str(folder))
    shutil.copytree(folder, copy)
    (copy / "s-00003.tar").unlink()
    make_catalogues(str(copy))

    def refused(rank, gather) -> bool:
        with pytest.raises(DataError, match="rank 1 reads another catalogue than rank 0"):
            open_dataset(str(copy if rank else folder), rank=rank, gather=gather)
        return True

    assert all(in_ranks(refused, 2))
    (copy / NAME).unlink()
    assert all(in_ranks(refused, 2))
