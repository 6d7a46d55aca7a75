"""Shards are read over HTTP by range requests; a dropped connection is resumed, counted, and given up in the end."""

import contextlib
import hashlib
import http.server
import json
import os
import resource
import threading

import numpy as np
import pytest

import tars
from shards import index, verify
from shards.errors import InputError
from shards.format.split import load_labels, load_split, read_idx
from shards.machine import remote


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges. `drops`: how many answers end half-way; `requests`: (path, range) as they came."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.drops, self.status, self.ranges = folder, [], 0, [], True
        self.on_drop = lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        path = os.path.join(server.folder, self.path.lstrip("/"))
        if server.status:
            return self.send_error(server.status.pop(0))
        if not os.path.isfile(path):
            return self.send_error(404)
        with open(path, "rb") as file:
            data = file.read()
        etag = str(hash(data))
        if self.headers.get("Range") and server.ranges:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                return self.send_error(416)
            body = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}")
        else:
            body = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        self.end_headers()
        if server.drops and len(body) > 1:
            server.drops -= 1
            body = body[: len(body) // 2]
            server.on_drop()
            self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote, "retries", 0)
    served = Server(str(tmp_path))
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


DATA = bytes(range(256)) * 20_000  # 5 MB


def test_reads_a_range_and_a_whole_file(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    assert remote.read_range(f"{server.url}/a", 1000, 300_000) == DATA[1000:301_000]
    assert server.requests == [("/a", "bytes=1000-300999")]
    assert remote.read_file(f"{server.url}/a") == DATA
    assert remote.size_of(f"{server.url}/a") == len(DATA)
    assert remote.retries == 0


def test_a_dropped_connection_is_resumed_where_it_dropped(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    server.drops = 3
    assert remote.read_range(f"{server.url}/a", 1000, 4_000_000) == DATA[1000:4_001_000]
    assert remote.retries == 3
    starts = [int(r.removeprefix("bytes=").partition("-")[0]) for _, r in server.requests]
    assert starts == [1000, 2_001_000, 3_001_000, 3_501_000]  # nothing is sent twice


def test_at_most_n_retries(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    server.drops = 1000
    with pytest.raises(InputError, match=f"given up after {remote.RETRIES} retries"):
        remote.read_range(f"{server.url}/a", 0, len(DATA))
    assert remote.retries == remote.RETRIES and len(server.requests) == remote.RETRIES + 1


def test_a_busy_server_is_tried_again_and_a_refusal_is_not(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    server.status = [503, 429]
    assert remote.read_range(f"{server.url}/a", 0, 10) == DATA[:10]
    server.status = [403]
    with pytest.raises(InputError, match="no access to .*403"):
        remote.read_range(f"{server.url}/a", 0, 10)
    assert len(server.requests) == 4


def test_errors_name_the_url(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    with pytest.raises(FileNotFoundError):
        remote.read_file(f"{server.url}/none")
    for offset in (len(DATA) - 5, len(DATA) + 5):
        with pytest.raises(InputError, match=r"/a (has \d+ bytes|is shorter)"):
            remote.read_range(f"{server.url}/a", offset, 10)


def test_a_server_without_ranges_is_named_as_such(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    server.ranges = False
    assert remote.read_file(f"{server.url}/a") == DATA
    with pytest.raises(InputError, match="has no range requests"):
        remote.read_range(f"{server.url}/a", 5, 10)


def test_a_file_that_changes_half_way_is_never_mixed(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    server.drops = 1
    server.on_drop = lambda: (tmp_path / "a").write_bytes(DATA[::-1])
    with pytest.raises(InputError, match="changed while it was read"):
        remote.read_range(f"{server.url}/a", 0, len(DATA))


def test_no_server_ends_in_one_line(monkeypatch, server):
    server.server_close()
    with pytest.raises(InputError, match="cannot read http://127.0.0.1"):
        remote.read_range(f"{server.url}/a", 0, 10)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(InputError, match="pip install fsspec s3fs"):
        remote.read_range("s3://bucket/a", 0, 10)


def test_object_stores_are_read_in_pieces_and_resumed(monkeypatch):
    class Store:
        calls = []

        def cat_file(self, path, start, end):
            self.calls.append((start, end))
            if len(self.calls) == 2:
                raise RuntimeError("connection reset by peer")
            return DATA[start:end]

    monkeypatch.setattr(remote, "_filesystem", lambda url: Store())
    monkeypatch.setattr(remote, "_OBJECT_PIECE", 1_000_000)
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote, "retries", 0)
    assert remote.read_range("s3://bucket/a", 10, 2_500_000) == DATA[10:2_500_010]
    assert remote.retries == 1
    assert Store.calls == [(10, 1000010), (1000010, 2000010), (1000010, 2000010), (2000010, 2500010)]


def test_a_remote_split_loads_as_a_local_one(server, tmp_path):
    local = tars.make_split(tmp_path / "data")
    server.drops = 2
    url = f"{server.url}/data"
    split = load_split(url, "train")
    assert split.shards == local.shards and load_labels(split).tolist() == load_labels(local).tolist()
    assert [read_idx(split, shard) for shard in split.shards] == [read_idx(local, shard) for shard in local.shards]
    assert remote.retries == 2
    with pytest.raises(InputError, match="there is no .*/data/val.json"):
        load_split(url, "val")


def test_verify_reads_every_byte_of_remote_shards_once(server, tmp_path, capsys):
    tars.make_split(tmp_path / "data")
    server.drops = 3
    assert verify.main([f"{server.url}/data", "--json", "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["splits"]["train"]["samples"] == 12
    tar = sum((tmp_path / "data" / f"train-00000{k}.tar").stat().st_size for k in (0, 1))
    assert report["bytes"] == tar
    tars.flip(tmp_path / "data/train-000001.tar", 2000)
    assert verify.main([f"{server.url}/data", "--json", "--workers", "1"]) == 2
    assert {p["shard"] for p in json.loads(capsys.readouterr().out)["problems"]} == {"train-000001.tar"}
    os.unlink(tmp_path / "data/train-000001.tar")
    assert verify.main([f"{server.url}/data", "--json", "--workers", "1"]) == 2
    assert "missing" in capsys.readouterr().out


def test_drops_in_worker_processes_are_counted(server, tmp_path, capsys):
    tars.make_split(tmp_path / "data", (6, 6, 6))
    folder = tmp_path / "index"
    index.main([f"{server.url}/data", "--out", str(folder), "--splits", "train=train-{000000..000002}.tar"])
    server.drops = 4
    capsys.readouterr()
    assert verify.main([str(folder), "--json", "--workers", "2"]) == 0
    assert "4 dropped connections were resumed" in json.loads(capsys.readouterr().out)["notes"]


def test_remote_shards_are_indexed_into_a_folder(server, tmp_path):
    tars.make_split(tmp_path / "data")
    out = tmp_path / "index"
    with pytest.raises(InputError, match="--out DIR"):
        index.main([f"{server.url}/data"])
    with pytest.raises(InputError, match="a web server does not list its files"):
        index.main([f"{server.url}/data", "--out", str(out)])
    for pattern in ("train-{000000..000001}.tar", f"{server.url}/data/train-{{000000..000001}}.tar"):
        index.main([f"{server.url}/data", "--out", str(out), "--splits", f"train={pattern}", "--workers", "1"])
        split = load_split(str(out), "train")
        assert [shard.url for shard in split.shards] == [f"{server.url}/data/train-00000{k}.tar" for k in (0, 1)]
        assert load_labels(split).tolist() == [i % 5 for i in range(12)]
    server.status = [404]
    with pytest.raises(InputError, match="cannot read http.*there is no such file"):
        index.main([f"{server.url}/data", "--out", str(out), "--splits", "train=none-0.tar", "--workers", "1"])


def test_training_reads_remote_shards_through_dropped_connections(server, tmp_path):
    pytest.importorskip("torch")
    from job.batches.loader import Loader

    def batches(data):
        split = load_split(str(data), "train")
        with Loader(split, rank=0, world_size=1, global_batch=4, crop=40, train=False, workers=0) as loader:
            return [(batch.images.numpy().copy(), batch.labels.tolist(), batch.bad) for batch in loader]

    tars.make_split(tmp_path / "data")
    expected = batches(tmp_path / "data")
    server.drops = 5
    found = batches(f"{server.url}/data")
    assert remote.retries == 5
    for (images, labels, bad), (others, their, none) in zip(found, expected, strict=True):
        assert np.array_equal(images, others) and labels == their and bad == none == 0


def test_a_full_disk_ends_in_one_line_and_nothing_is_fetched_twice(server, tmp_path):
    """A limit on the size of files stands for the disk: the system refuses to write as it does there."""
    (tmp_path / "a.tar").write_bytes(DATA)
    digest = hashlib.sha256(DATA).hexdigest()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        with pytest.raises(
            InputError, match="cannot keep .*a.tar in .*; SHARDS_CACHE must name a folder with room"
        ) as error:
            remote.cached(f"{server.url}/a.tar", str(tmp_path / "cache"), len(DATA), digest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not error.value.everywhere and "\n" not in str(error.value)
    server.requests.clear()
    path = remote.cached(f"{server.url}/a.tar", str(tmp_path / "cache"), len(DATA), digest)
    assert open(path, "rb").read() == DATA
    assert int(server.requests[0][1].removeprefix("bytes=").partition("-")[0]) > 2_000_000


def test_an_index_on_a_server_names_no_file_of_this_machine(server, tmp_path):
    tars.make_split(tmp_path / "data")
    for url in ("/etc/passwd", "pipe:touch pwned"):
        fields = json.loads((tmp_path / "data/train.json").read_text())
        fields["shardlist"][0]["url"] = url
        (tmp_path / "data/train.json").write_text(json.dumps(fields))
        with pytest.raises(InputError, match="not on its server|only files and"):
            load_split(f"{server.url}/data", "train")


def test_a_node_fetches_each_shard_once_into_its_cache(server, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from job.batches.loader import Loader

    tars.make_split(tmp_path / "data", (6, 6, 6))
    cache = tmp_path / "cache"
    monkeypatch.setenv("SHARDS_CACHE", str(cache))
    split = load_split(f"{server.url}/data", "train")
    labels = []
    for workers in (2, 0):
        with Loader(split, rank=0, world_size=1, global_batch=6, crop=40, train=False, workers=workers) as loader:
            labels.append([label for batch in loader for label in batch.labels.tolist()])
    assert labels[0] == labels[1] == [i % 5 for i in range(18)]
    asked = sorted(path for path, _ in server.requests if path.endswith(".tar"))
    assert asked == [f"/data/train-00000{k}.tar" for k in range(3)]
    assert {path.stat().st_size for path in cache.glob("*.tar")} == {shard.filesize for shard in split.shards}


def test_the_cache_carries_on_and_refuses_what_was_not_packed(server, tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    digest = hashlib.sha256(DATA).hexdigest()
    cache = tmp_path / "cache"
    server.drops = 1000
    with pytest.raises(InputError, match="given up"):
        remote.cached(f"{server.url}/a.tar", str(cache), len(DATA), digest)
    server.drops, server.requests = 0, []
    path = remote.cached(f"{server.url}/a.tar", str(cache), len(DATA), digest)
    assert int(server.requests[0][1].removeprefix("bytes=").partition("-")[0]) > len(DATA) // 2
    assert open(path, "rb").read() == DATA and os.path.dirname(path) == str(cache)
    with pytest.raises(InputError, match="its sha256 is not"):
        remote.cached(f"{server.url}/a.tar", str(cache), len(DATA), "0" * 64)
    with pytest.raises(InputError, match="is not there"):
        remote.cached(f"{server.url}/../../b.tar", str(cache), 10, digest)
    os.truncate(path, 1000)  # by whatever: it is fetched again
    assert open(remote.cached(f"{server.url}/a.tar", str(cache), len(DATA), digest), "rb").read() == DATA
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot keep"):
        remote.cached(f"{server.url}/a.tar", str(tmp_path / "file"), len(DATA), digest)
