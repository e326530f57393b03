"""A file fetched over HTTP: resumed where it was cut off, sent through the
user's proxy, with the user's certificates and password."""

import base64
import hashlib
import http.client
import os
import pathlib
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import TypeVar

import tqdm

from llama_jax import errors
from llama_jax.checkpoint import atomic

ATTEMPTS = 4  # in a row without a new byte
RETRY_SECONDS = 1.0  # doubles after every attempt
TIMEOUT_SECONDS = 60
BLOCK_BYTES = 1 << 20

# What a request raises when the other side, or the way there, is broken.
BROKEN = (
  urllib.error.URLError,
  http.client.HTTPException,
  ConnectionError,
  TimeoutError,
  ssl.SSLError,
)

_Result = TypeVar("_Result")


def sha256(path: pathlib.Path) -> str:
  """Of a file, in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class Client:
  """Opens URLs in the user's way.

  Args:
    home: where the password in it, https://NAME:WORD@HOST/, may be sent to.
    certificates: a bundle or a folder of them, instead of the system's.
    proxy: instead of that in the environment.
    verify: whether a certificate must be good.
  """

  def __init__(
    self,
    home: str,
    certificates: str | None = None,
    proxy: str | None = None,
    verify: bool = True,
  ):
    self._home, self._authorization = _split_credentials(home)
    context = ssl.create_default_context()
    if certificates:
      path = os.path.expanduser(certificates)
      try:
        where = "capath" if os.path.isdir(path) else "cafile"
        context.load_verify_locations(**{where: path})
      except OSError as error:
        raise errors.UserError(
          f"the certificate bundle {certificates} (pip's `cert`) cannot be"
          f" read: {error.strerror or error}"
        ) from None
    if not verify:
      context.check_hostname = False
      context.verify_mode = ssl.CERT_NONE
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
    if not authorization and _origin(url) == _origin(self._home):
      authorization = self._authorization
    if authorization:
      headers["Authorization"] = authorization
    headers["User-Agent"] = "llama_jax"
    headers["Accept-Encoding"] = "identity"
    request = urllib.request.Request(url, headers=headers)
    return self._opener.open(request, timeout=TIMEOUT_SECONDS)

  def read_page(self, url: str, accept: str) -> tuple[bytes, str, str]:
    """(body, content type, URL after redirects).

    Raises one of BROKEN if several attempts got nothing.
    """

    def attempt():
      with self.open(url, Accept=accept) as response:
        kind = response.headers.get("Content-Type", "")
        return response.read(), kind, response.url

    return _persist(attempt)

  def download(
    self, url: str, part: pathlib.Path, remedy: str, progress: bool = True
  ) -> None:
    """Completes the file `part`, going on where an earlier attempt stopped.

    Args:
      url: of the whole file.
      part: what there is of it; need not exist.
      remedy: what the user can do if the disk is too small for it twice,
        packed and unpacked.
      progress: whether to draw a bar on stderr.

    Raises:
      UserError: no space, or the download broke off; what came is kept.
    """
    bar = tqdm.tqdm(
      desc=part.name.removesuffix(".part"),
      unit="B",
      unit_scale=True,
      dynamic_ncols=True,
      disable=not progress,
    )
    try:
      with bar:
        _persist(
          lambda: self._rest(url, part, remedy, bar), lambda: _size(part)
        )
    except BROKEN as error:
      raise errors.UserError(
        f"the download of {shown(url)} broke off after"
        f" {_size(part) / 1e6:.1f} MB: {reason(error)}; run the same command"
        " again and it goes on from there"
      ) from None

  def _rest(self, url: str, part: pathlib.Path, remedy: str, bar) -> None:
    start = _size(part)
    try:
      response = self.open(
        url, **({"Range": f"bytes={start}-"} if start else {})
      )
    except urllib.error.HTTPError as error:
      if error.code != 416 or not start:
        raise
      # All of it is there already, or more than there is to have.
      if (error.headers.get("Content-Range") or "").endswith(f"/{start}"):
        return
      part.unlink()
      start, response = 0, self.open(url)
    with response:
      if response.status != 206:
        start = 0  # the server sends the whole file
      else:
        span = response.headers.get("Content-Range") or ""
        if not re.match(rf"bytes {start}-", span):
          part.unlink(missing_ok=True)
          raise ConnectionError("the server sent another range than asked for")
      length = response.headers.get("Content-Length")
      total = start + int(length) if length else None
      if total:
        atomic.check_free(part.parent, 2 * total - start, remedy)
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


def shown(url: str) -> str:
  """`url` as it may be printed: no credentials, no signed query."""
  bare, _ = _split_credentials(url)
  return urllib.parse.urlsplit(bare)._replace(query="", fragment="").geturl()


def reason(error: Exception) -> str:
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


class _Redirects(urllib.request.HTTPRedirectHandler):
  """Sends a password on to the same host only."""

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    new = super().redirect_request(req, fp, code, msg, headers, newurl)
    if new is not None and _origin(req.full_url) != _origin(newurl):
      new.remove_header("Authorization")
    return new


def _persist(
  attempt: Callable[[], _Result], have: Callable[[], int] = lambda: 0
) -> _Result:
  """The attempt's result; tries again while that may help.

  have: bytes that stay from one attempt to the next. One that added some is
    no failure.
  """
  wait, failures, before = RETRY_SECONDS, 0, have()
  while True:
    try:
      return attempt()
    except BROKEN as error:
      if have() > before:
        wait, failures = RETRY_SECONDS, 0
      before = have()
      failures += 1
      if failures >= ATTEMPTS or not _may_pass(error):
        raise
    time.sleep(wait)
    wait *= 2


def _may_pass(error: Exception) -> bool:
  """Whether the trouble may be over a moment later."""
  if isinstance(error, urllib.error.HTTPError):
    return error.code in (408, 425, 429) or error.code >= 500
  cause = getattr(error, "reason", error)
  return not isinstance(cause, ssl.SSLCertVerificationError)


def _read(response) -> bytes:
  try:
    return response.read(BLOCK_BYTES)
  except OSError as error:
    # So that no route to the host is not taken for trouble with the disk.
    if isinstance(error, BROKEN):
      raise
    raise ConnectionError(error.strerror or str(error)) from error


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0


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
