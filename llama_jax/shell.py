"""How a verb meets the shell: flags, one-line errors, exit codes, caches.

Exit codes: 0 done, 2 a mistake of the user's (one line on stderr), 130 and 143
stopped by Ctrl-C or SIGTERM, 1 a fault of ours (with its traceback).
"""

import ctypes
import dataclasses
import difflib
import errno
import functools
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from llama_jax import errors

_DEVICES = flags.DEFINE_integer(
  "cpu_devices",
  None,
  "Simulate this many CPU devices, to try a mesh without accelerators.",
  lower_bound=1,
)

_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's own name.

_USERS_ERRORS = (
  errno.ENOSPC,
  errno.EACCES,
  errno.EROFS,
  errno.EEXIST,
  errno.ENOTDIR,
  errno.EISDIR,
)


def define_parallel() -> Callable[[], dict[str, int]]:
  """Defines the flags of parallel.mesh.ParallelConfig; call it for them."""
  axes = {
    axis: flags.DEFINE_integer(
      f"parallel.{axis}", 1, f"{what}; -1 for the devices that are left."
    )
    for axis, what in (
      ("data", "Copies of the model, each with its part of the batch"),
      ("fsdp", "Parts of every weight, put together where it is used"),
      ("tensor", "Parts of heads, MLP width and vocabulary"),
    )
  }
  return lambda: {axis: flag.value for axis, flag in axes.items()}


def fail(message: str) -> None:
  """One line on stderr, exit status 2."""
  print("error: " + " ".join(str(message).split("\n")), file=sys.stderr)
  sys.exit(2)


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Parses flags, sets JAX up and runs a verb; a mistake ends in one line."""

  def guarded(argv: Sequence[str]):
    try:
      if len(argv) > 1:
        raise errors.UserError(
          f"{argv[1]!r} is not a flag; flags look like --name=value."
          " See --help."
        )
      _set_up_jax()
      _heed_interrupts()
      return main(argv)
    except errors.UserError as error:
      fail(str(error))
    except KeyboardInterrupt:
      print("\ninterrupted", file=sys.stderr)
      sys.exit(130)
    except (MemoryError, RuntimeError) as error:
      # What XLA raises has many causes.
      full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(
        error
      )
      if not full:
        raise
      fail(
        f"{str(error) or 'Out of memory.'} Ask for less at once (a smaller"
        " batch, row or cache) or a smaller dtype, or share it among devices."
      )
    except BrokenPipeError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(141)
    except OSError as error:
      if error.errno not in _USERS_ERRORS:
        raise
      fail(f"{error.filename or 'a file'}: {error.strerror}.")

  app.run(guarded, flags_parser=_parse)


def _heed_interrupts() -> None:
  """Sends Ctrl-C again where Python drops what is raised.

  It may come while a destructor or a callback of the garbage collector runs,
  of which JAX has one; there the interpreter prints and forgets it.
  """
  others = sys.unraisablehook

  def hook(dropped):
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
      return others(dropped)
    main = threading.main_thread().ident
    again = threading.Timer(  # When this and what called it have returned.
      0.02, signal.pthread_kill, (main, signal.SIGINT)
    )
    again.daemon = True
    again.start()

  sys.unraisablehook = hook


def _parse(argv: Sequence[str]) -> list[str]:
  """absl's parser, its complaints in one line each."""
  # absl prints help through its own parser; a config file may raise anything.
  try:
    return flags.FLAGS(_strict(list(argv)))
  except flags.Error as error:
    text = str(error).replace("FATAL Flags parsing error:", "").strip()
    fail(f"{text} See --help.")
  except errors.UserError as error:
    fail(str(error))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    fail(_override_error(argv, error))
  except (OSError, ImportError, SyntaxError) as error:
    fail(f"--config could not be read: {error}.")
  raise AssertionError("fail does not return")


def _strict(argv: list[str]) -> list[str]:
  """Names the nearest config key where an override's is misspelt."""
  path = _given(argv, "config")
  wanted = [
    word.split("=")[0].lstrip("-").removeprefix("config.")
    for word in argv[1:]
    if word.lstrip("-").startswith("config.")
  ]
  if path is None or "config" not in flags.FLAGS:
    return argv
  if not pathlib.Path(path.split(":")[0]).is_file():
    raise errors.ConfigError(
      f"--config={path} does not exist; the recipes are in configs/."
    )
  try:
    known = keys(load_config(path))
  except errors.UserError:
    raise
  except Exception as error:  # whatever a config file of the user's raises
    raise errors.ConfigError(
      f"--config={path}: {type(error).__name__}: {error}"
    ) from error
  for key in wanted:
    # A list's element or a whole section may be named too.
    if key in known or any(k.startswith(key + ".") for k in known):
      continue
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    raise errors.ConfigError(
      f"--config.{key} is not a knob of {path}; the nearest is"
      f" --config.{nearest[0]}. There are: {', '.join(known)}."
    )
  return argv


def _given(argv: Sequence[str], name: str) -> str | None:
  for index, word in enumerate(argv):
    stripped = word.lstrip("-")
    if stripped.startswith(name + "="):
      return stripped.partition("=")[2]
    if word.startswith("-") and stripped == name and index + 1 < len(argv):
      return argv[index + 1]
  return None


def _override_error(argv: Sequence[str], error: Exception) -> str:
  overrides = [w for w in argv[1:] if w.lstrip("-").startswith("config.")]
  shown = " ".join(overrides) or "--config"
  text = str(error).strip().splitlines()
  return f"{shown}: {text[0] if text else type(error).__name__}"


def load_config(path: str):
  """The ConfigDict of a config file's get_config()."""
  import importlib.util

  file, _, argument = path.partition(":")
  spec = importlib.util.spec_from_file_location("llama_jax_config", file)
  if spec is None or spec.loader is None:
    raise errors.ConfigError(f"--config={path} is not a Python file.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument else module.get_config()


def keys(config, prefix: str = "") -> list[str]:
  """All dotted keys of a ConfigDict."""
  found = []
  for name, value in config.items():
    if hasattr(value, "items"):
      found += keys(value, f"{prefix}{name}.")
    else:
      found.append(prefix + name)
  return found


def section(cls: type, values, name: str):
  """A ConfigDict's section as the frozen dataclass that it configures.

  name: as the config has it; "" for the config itself. A field that has a
  default may be left out. Raises ConfigError where another is missing or one
  is not the class's.
  """
  place = f"config.{name}." if name else "config."
  names = [field.name for field in dataclasses.fields(cls)]
  given = {
    key: value.to_dict() if hasattr(value, "to_dict") else value
    for key, value in values.items()
  }
  for key in given:
    if key not in names:
      nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
      raise errors.ConfigError(
        f"{place}{key} is not a knob; the nearest is {place}{nearest}. There"
        f" are: {', '.join(names)}."
      )
  missing = [
    field.name
    for field in dataclasses.fields(cls)
    if field.name not in given and field.default is dataclasses.MISSING
  ]
  if missing:
    raise errors.ConfigError(
      f"the config lacks {', '.join(place + m for m in missing)}."
    )
  return cls(**given)


def _set_up_jax() -> None:
  if not flags.FLAGS["verbosity"].present:
    # The libraries below narrate at INFO.
    logging.set_verbosity(logging.WARNING)
  if _DEVICES.value is not None:
    simulate_devices(_DEVICES.value)
  set_up_compiling()


def simulate_devices(count: int) -> None:
  """So many CPU devices, with threads enough to wait for each other.

  Each collective operation blocks a thread until all its devices have come to
  it, and a device starts those that do not depend on each other in any order.
  All devices' threads come out of one pool, whose size XLA takes from NPROC; by
  default as many as there are devices: all of them can end up waiting for one
  that has no thread left, until XLA aborts the process after 40 seconds.
  """
  import jax

  os.environ.setdefault("NPROC", str(max(16 * count, os.cpu_count() or 1)))
  jax.config.update("jax_num_cpu_devices", count)


def set_up_compiling() -> None:
  """Keeps compiled programs between runs, unless JAX was told where to.

  A compiler's memory goes back to the system when it is done.
  """
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    from llama_jax.checkpoint import package_index

    folder = package_index.cache_folder() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  _free_after_compiling()


@functools.cache  # A listener once a process.
def _free_after_compiling() -> None:
  """Hands freed memory to the system after each compile of a second or more.

  glibc keeps what a compiler freed for whoever asks next, a quarter of a
  gigabyte after a training step on CPU; tensors are too large to ask there.
  Other C libraries have no such call.
  """
  import jax

  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is None:
    return
  trim.argtypes = [ctypes.c_size_t]

  def heed(event: str, seconds: float, **_) -> None:
    if event == _COMPILED and seconds >= 1:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(heed)
