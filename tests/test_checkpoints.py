"""Checkpoints: names, paths, URLs; strictness; damage; downloads from a server on this machine."""

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from safetensors import safe_open

from anyup_fast import AnyUp, checkpoints, files
from anyup_fast.checkpoints import save_checkpoint

load_checkpoint = partial(checkpoints.load_checkpoint, architecture=AnyUp)


class Server(BaseHTTPRequestHandler):
    """Serves `content`; `ranges` = it can resume, `stop_after` = it breaks off after that many bytes."""

    def __init__(self, site, *args):
        self.site = site
        super().__init__(*args)

    def do_GET(self):
        self.site.requests.append((self.path, self.headers.get("Range")))
        time.sleep(self.site.delay)
        content, start = self.site.content, 0
        if content is None or self.site.status:
            self.send_error(self.site.status or 404)
            return
        wanted = self.headers.get("Range")
        if wanted and self.site.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.site.stop_after])
        self.wfile.flush()
        self.site.hanging.wait(30)

    def log_message(self, *args):
        self.site.log.append(args)


class Site:
    def __init__(self):
        self.content, self.ranges, self.stop_after, self.status = b"", True, None, None
        self.requests, self.log, self.delay = [], [], 0
        self.hanging = threading.Event()  # set: a reply ends when all is sent
        self.hanging.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}/anyup_multi_backbone.pth"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # asks each 10 ms

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    monkeypatch.setitem(checkpoints.PUBLISHED, NAME, site.url)
    yield site
    site.close()


@pytest.fixture
def published(tmp_path):
    """Bytes of a pickled state dict with the default configuration, as the authors publish it."""
    torch.manual_seed(0)
    torch.save(AnyUp().state_dict(), tmp_path / "published.pth")
    return (tmp_path / "published.pth").read_bytes()


NAME = "anyup_multi_backbone"


def cached(suffix=""):
    return checkpoints.cache_folder() / f"{NAME}.pth{suffix}"


def test_safetensors_carry_their_configuration(tmp_path):
    path = tiny.checkpoint(tmp_path / "model.safetensors")
    state_dict, config = load_checkpoint(path)
    assert config == tiny.CONFIG
    model = AnyUp.from_pretrained(path)
    assert not model.training
    for name, tensor in tiny.model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) and torch.equal(state_dict[name], tensor)


def test_a_name_is_downloaded_once_and_works_offline_afterwards(site, published, tmp_path):
    site.content = published
    first, config = load_checkpoint(NAME)
    assert config == {} and len(first) == 73
    assert cached() == tmp_path / "torch" / "hub" / "checkpoints" / "anyup_multi_backbone.pth"
    assert cached().read_bytes() == published
    site.close()
    second, _ = load_checkpoint(NAME)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(site.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_kept_and_finished_later(site, published, ranges):
    site.content, site.ranges, site.stop_after = published, ranges, 1000
    with pytest.raises(RuntimeError, match=r"1000 of \d+ bytes arrived.*put it at .*anyup_multi_backbone.pth"):
        load_checkpoint(NAME)
    assert not cached().exists()
    site.stop_after = None
    load_checkpoint(NAME)
    assert cached().read_bytes() == published
    assert site.requests[-1][1] == "bytes=1000-"
    assert not cached(".part").exists()


def test_a_url_is_kept_apart_from_files_of_the_same_name_elsewhere(site, published):
    site.content = published
    first = checkpoints.locate_checkpoint(site.url)
    second = checkpoints.locate_checkpoint(site.url.replace("/anyup", "/other/anyup") + "?download=1")
    assert first.suffix == second.suffix == ".pth" and len({first, second, cached()}) == 3
    assert not cached().exists() and len(site.requests) == 2
    load_checkpoint(site.url)
    assert len(site.requests) == 2


def test_a_file_url_is_the_file(tmp_path):
    path = tiny.checkpoint(tmp_path / "a model.safetensors")
    assert checkpoints.locate_checkpoint(path.as_uri()) == path
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.pth"):
        load_checkpoint((tmp_path / "missing.pth").as_uri())


@pytest.mark.parametrize(
    "url", ["s3://bucket/model.pth", "http://host", "https:///model.pth", "://x", "http://host/a/"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match=r"weights: need http\(s\)://HOST/.../FILE .* got the URL"):
        load_checkpoint(url)


def test_a_part_that_is_longer_than_the_file_is_dropped(site, published):
    cached().parent.mkdir(parents=True)
    cached(".part").write_bytes(published + b"more")
    site.content = published
    load_checkpoint(NAME)
    assert cached().read_bytes() == published


def test_errors_of_the_server_name_the_way_by_hand(site):
    site.content = None
    with pytest.raises(RuntimeError, match=r"the server answered 404 .* or pass weights=<path of the file>"):
        load_checkpoint(NAME)
    site.status = 416
    with pytest.raises(RuntimeError, match="the server answered 416"):
        load_checkpoint(NAME)
    assert len(site.requests) == 2


def test_no_network_names_the_way_by_hand(site):
    site.close()
    with pytest.raises(RuntimeError, match=r"could not download .*refused.*put it at"):
        load_checkpoint(NAME)


def test_a_damaged_download_is_refused(site, published):
    site.content = published[:-1000]
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"backbone.pth is damaged or no checkpoint.*remove it and fetch it again"
        ):
            load_checkpoint(NAME)
    cached().unlink()
    site.content = published
    load_checkpoint(NAME)


def test_a_folder_that_cannot_be_made_names_the_way_by_hand(site, tmp_path):
    (tmp_path / "torch").write_text("in the way")
    with pytest.raises(RuntimeError, match="could not download .* or pass weights=<path of the file>"):
        load_checkpoint(NAME)


# ---- processes that start together


def together(count, late):
    """Paths that so many threads get from downloads begun at once, and one begun `late` seconds later."""
    start = threading.Barrier(count)

    def one(wait):
        if wait:
            time.sleep(wait)
        else:
            start.wait()
        return checkpoints.locate_checkpoint(NAME)

    with ThreadPoolExecutor(count + 1) as pool:
        return list(pool.map(one, [0] * count + [late]))


def left_over():
    return sorted(path.name for path in checkpoints.cache_folder().iterdir())


def test_four_that_start_together_and_a_late_fifth_fetch_once(site, published):
    site.content, site.delay = published, 0.3
    assert together(4, late=0.15) == [cached()] * 5
    assert cached().read_bytes() == published and left_over() == [cached().name]
    assert len(site.requests) == 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_download_each(site, published, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    site.content, site.delay = published, 0.2
    assert together(3, late=0.1) == [cached()] * 4
    assert cached().read_bytes() == published and left_over() == [cached().name]
    assert all(asked is None for _, asked in site.requests), "nobody goes on with the part of another"


def test_other_errors_of_locking_are_told(site, published, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    site.content = published
    with pytest.raises(RuntimeError, match="could not download .*Input/output error"):
        load_checkpoint(NAME)


def test_after_a_killed_process_the_next_one_goes_on(site, published):
    site.content, site.stop_after = published, 2_000_000
    site.hanging.clear()
    script = "import sys; from anyup_fast.checkpoints import download; download(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, site.url, str(cached())])
    try:
        deadline = time.time() + 60
        while not cached(".part").exists() or cached(".part").stat().st_size < 1_000_000:
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    site.hanging.set()
    site.stop_after, have = None, cached(".part").stat().st_size
    load_checkpoint(NAME)
    assert cached().read_bytes() == published and left_over() == [cached().name]
    assert site.requests[-1][1] == f"bytes={have}-"


def test_locks_let_one_in_at_a_time(tmp_path):
    inside, most = [], []

    def enter(_):
        with files.alone(tmp_path / "a.lock", "testing") as locked:
            inside.append(locked)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(60)))
    assert most == [1] * 60 and list(tmp_path.iterdir()) == []


def test_an_interrupted_download_is_gone_on_with(site, published, monkeypatch):
    def interrupted(reply, file):
        file.write(reply.read(5000))
        raise KeyboardInterrupt

    site.content = published
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_checkpoint(NAME)
    assert left_over() == [cached(".part").name]
    load_checkpoint(NAME)
    assert site.requests[-1][1] == "bytes=5000-" and cached().read_bytes() == published


def test_a_cache_that_cannot_be_written_serves_what_it_holds(site, published, monkeypatch):
    def read_only(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    site.content = published
    cached().parent.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(RuntimeError, match=r"Read-only file system.* \(TORCH_HOME names another folder\), or pass"):
            load_checkpoint(NAME)
        cached().write_bytes(published)
        load_checkpoint(NAME)
    assert site.requests == []


@pytest.mark.slow("five processes that import PyTorch; one loads by default")
def test_four_processes_and_a_late_fifth_load(site, published):
    site.content, site.delay = published, 3
    script = f"from anyup_fast import AnyUp, checkpoints; checkpoints.PUBLISHED[{NAME!r}] = {site.url!r}; "
    script += f"print(sum(p.numel() for p in AnyUp.from_pretrained({NAME!r}).parameters()))"
    ranks = []
    for wait in (0, 0, 0, 0, 4):
        time.sleep(wait)
        ranks.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True))
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["878080"] * 5
    assert len(site.requests) == 1


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    save({"rope.freqs": Payload(trace)}, path)
    with pytest.raises(ValueError, match="its pickle holds other objects or code, which is not run"):
        load_checkpoint(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload would have left a trace"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("rope.freqs"), r"1 names missing \['rope.freqs'\], 0 unknown"),
        (lambda s: s.update(surplus=torch.zeros(1)), r"0 names missing \[\], 1 unknown \['surplus'\]"),
        (lambda s: s.update({"rope.freqs": torch.zeros(2, 31)}), r"rope.freqs .* has shape \(2, 31\), AnyUp needs"),
        (lambda s: s["rope.freqs"].fill_(torch.inf), "rope.freqs .* is not a finite floating-point tensor"),
        (lambda s: s["rope.freqs"].fill_(torch.nan), "rope.freqs .* is not a finite floating-point tensor"),
        (lambda s: s.update({"rope.freqs": torch.zeros(2, 32, dtype=torch.int32)}), "not a finite floating-point"),
    ],
)
def test_other_state_dicts_are_refused(tmp_path, damage, message):
    state_dict = tiny.model().state_dict()
    damage(state_dict)
    save_checkpoint(tmp_path / "model.safetensors", state_dict, tiny.CONFIG)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_files_are_refused(tmp_path, suffix):
    whole = tiny.checkpoint(tmp_path / "whole.safetensors")
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save(tiny.model().state_dict(), path)
    else:
        path.write_bytes(whole.read_bytes())
    content = path.read_bytes()
    for length in (0, 4, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(RuntimeError, match=r"weights: .* is damaged or no checkpoint \(.+\); remove it and fetch"):
            load_checkpoint(path)
    path.write_bytes(content)
    load_checkpoint(path) if suffix == "safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Sign in</html>", b"version https://git-lfs", bytes(300)])
def test_files_of_another_kind_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="is damaged or no checkpoint"):
        load_checkpoint(path)


def test_things_that_are_no_state_dict_are_refused(tmp_path):
    for thing in ([torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}, torch.zeros(1)):
        torch.save(thing, tmp_path / "thing.pth")
        with pytest.raises(ValueError, match="holds no state dict"):
            load_checkpoint(tmp_path / "thing.pth")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"depth": 3}, r"config in .* does not know: \['depth'\]"),
        ([1], r"config in .* does not know: \['\[1\]'\]"),
        ({"qk_dim": "wide"}, "no AnyUp can be made from the config"),
        ({"qk_dim": 33}, "no AnyUp can be made from the config"),
        ({"qk_dim": 64}, "has shape .*, AnyUp needs"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, config, message):
    save_checkpoint(tmp_path / "model.safetensors", tiny.model().state_dict(), config)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ("anyup_best", ValueError, "no checkpoint is called 'anyup_best'; use 'embedded', 'anyup_multi_backbone'"),
        ("missing.pth", FileNotFoundError, "weights: there is no file 'missing.pth'; check the path"),
        (3, ValueError, "weights: need a name, a path or a URL, got int"),
    ],
)
def test_unknown_weights_are_named(weights, error, message):
    with pytest.raises(error, match=message):
        load_checkpoint(weights)


def test_a_failing_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tiny.checkpoint(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.checkpoint(path, seed=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_embedded_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "EMBEDDED", tmp_path / "embedded.safetensors")
    with pytest.raises(FileNotFoundError, match="'embedded' is missing.*reinstall"):
        load_checkpoint("embedded")


@pytest.mark.skipif(not checkpoints.EMBEDDED.is_file(), reason="this checkout has no embedded weights yet")
def test_embedded_weights_are_shipped_and_small():
    state_dict, config = load_checkpoint("embedded")
    with safe_open(checkpoints.EMBEDDED, "pt") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "Apache-2.0" and "anyup-fast train" in metadata["trained_by"]
    assert checkpoints.EMBEDDED.stat().st_size < 4_000_000
    assert {**config, "window_ratio": 0.1} == {"window_ratio": 0.1}, "the default architecture"
    assert len(state_dict) == 73
    assert json.dumps(config)
