"""The download of the citation graphs, against a real server on this machine that serves well or badly."""

import hashlib
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from qpde.datasets import download, download_planetoid

PARTS = ("y", "allx", "ally", "tx", "ty", "graph", "test.index")
CONTENTS = {f"ind.cora.{part}": f"contents of {part} ".encode() * 1000 for part in PARTS}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENTS, whose SHA-256 replace the pinned ones. `faults` says what goes wrong with a file."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/data/")
            asked.append(name)
            fault = faults.get(name)
            if fault == "missing":
                self.send_error(404)
                return
            content = CONTENTS[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "hangs":
                released.wait()
            tampered = content[:-1] + b"!"
            self.wfile.write({"tampered": tampered, "cut short": content[:100]}.get(fault, content))

        def log_message(self, *_):
            pass

    def sha256(part):
        return hashlib.sha256(CONTENTS[f"ind.cora.{part}"]).hexdigest()

    monkeypatch.setitem(download.CHECKSUMS, "cora", {part: sha256(part) for part in PARTS})
    faults, asked, released = {}, [], threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.url = f"http://127.0.0.1:{running.server_port}/data"
        running.faults, running.asked = faults, asked
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        released.set()
        running.shutdown()
        thread.join()


def files(folder):
    """All that is there, hidden files too, so that no part of a file goes unseen."""
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_download_brings_the_seven_files_and_says_where_they_are(server, tmp_path):
    folder = download_planetoid("cora", tmp_path / "new" / "folder", base_url=server.url)
    assert folder == tmp_path / "new" / "folder"
    assert files(folder) == CONTENTS


def test_files_that_are_there_are_not_fetched_again_and_damaged_ones_are_replaced(server, tmp_path):
    download_planetoid("cora", tmp_path, base_url=server.url)
    server.asked.clear()
    download_planetoid("cora", tmp_path, base_url=server.url)
    assert server.asked == []
    (tmp_path / "ind.cora.tx").write_bytes(b"damaged")
    download_planetoid("cora", tmp_path, base_url=server.url)
    assert server.asked == ["ind.cora.tx"]
    assert files(tmp_path) == CONTENTS


def test_a_tampered_file_is_refused_naming_both_sums_and_nothing_of_it_is_kept(server, tmp_path):
    server.faults["ind.cora.ally"] = "tampered"
    expected = download.CHECKSUMS["cora"]["ally"]
    found = hashlib.sha256(CONTENTS["ind.cora.ally"][:-1] + b"!").hexdigest()
    with pytest.raises(ValueError, match=rf"ind\.cora\.ally.*expected {expected} but got {found}"):
        download_planetoid("cora", tmp_path, base_url=server.url)
    assert sorted(files(tmp_path)) == ["ind.cora.allx", "ind.cora.y"]  # those that came before it


@pytest.mark.parametrize(
    ("fault", "message"),
    [("missing", "404"), ("cut short", "IncompleteRead"), ("hangs", "timed out")],
)
def test_a_server_that_fails_is_named_and_a_second_call_goes_on_from_there(server, tmp_path, fault, message):
    server.faults["ind.cora.graph"] = fault
    with pytest.raises(OSError, match=rf"cannot fetch http.*ind\.cora\.graph: .*{message}"):
        download_planetoid("cora", tmp_path, base_url=server.url, timeout=0.2)
    assert files(tmp_path) == {f"ind.cora.{part}": CONTENTS[f"ind.cora.{part}"] for part in PARTS[:5]}
    server.faults.clear()
    server.asked.clear()
    download_planetoid("cora", tmp_path, base_url=server.url)
    assert server.asked == ["ind.cora.graph", "ind.cora.test.index"]
    assert files(tmp_path) == CONTENTS


def test_no_server_at_all_is_an_error_that_says_what_to_do(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), None) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    with pytest.raises(OSError, match="check the network, or bring the file by hand"):
        download_planetoid("cora", tmp_path, base_url=url)


def test_an_interrupted_write_leaves_the_old_file_and_no_piece_of_the_new(server, tmp_path, monkeypatch):
    (tmp_path / "ind.cora.y").write_bytes(b"old")

    def interrupted(part, target):
        # What a killed process would leave is beside the old file and does not look like a citation graph.
        assert Path(part).read_bytes() == CONTENTS["ind.cora.y"]
        assert [path.name for path in tmp_path.glob("ind.cora.*")] == ["ind.cora.y"]
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_planetoid("cora", tmp_path, base_url=server.url)
    assert files(tmp_path) == {"ind.cora.y": b"old"}


def test_an_unknown_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'reddit'.*cora, citeseer, pubmed"):
        download_planetoid("reddit", tmp_path)
    assert os.listdir(tmp_path) == []


def test_without_pooch_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match="pip install pooch"):
        download_planetoid("cora", tmp_path)


@pytest.mark.parametrize("name", download.CHECKSUMS)
def test_the_pinned_sums_are_those_of_the_real_files(data_dir, name, tmp_path):
    for part in PARTS:
        file = f"ind.{name}.{part}"
        (tmp_path / file).symlink_to(data_dir / "planetoid/raw" / file)
    # Every file is recognised: nothing is asked of a server that does not exist.
    download_planetoid(name, tmp_path, base_url="http://127.0.0.1:1")
