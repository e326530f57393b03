"""Verbs on top, nouns below, arrows down: read from the imports themselves."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "llama_jax"

# room -> what of ours it may import, besides itself and errors.
BELOW = {
  "errors": set(),
  "huge_pages": set(),
  "cores": set(),
  "text": set(),
  "parallel": set(),
  "kernels": {"cores", "parallel"},
  "objectives": set(),
  "data": {"cores", "text"},
  "model": {"kernels", "parallel"},
  "checkpoint": {"model", "text"},
  "decoding": {"kernels", "model", "parallel"},
  "training": {"objectives", "decoding", "model", "parallel"},
  "evals": {"text", "data", "objectives", "decoding", "model"},
  # Nouns that live on top, for verbs and notebooks.
  "llama": {"checkpoint", "decoding", "kernels", "model", "text"},
  "shell": {"checkpoint"},
  "terminal": {"checkpoint"},
  "answers": {"checkpoint"},
  "completion": {"decoding", "text"},
  "batch": {"answers", "completion", "decoding", "text"},
  "experiment": {
    "data",
    "evals",
    "model",
    "objectives",
    "parallel",
    "shell",
    "training",
  },
  "compatibility": {
    "checkpoint",
    "data",
    "experiment",
    "model",
    "objectives",
    "parallel",
  },
  "learning": {
    "checkpoint",
    "compatibility",
    "data",
    "decoding",
    "evals",
    "experiment",
    "kernels",
    "objectives",
    "training",
  },
  "run": {
    "checkpoint",
    "compatibility",
    "data",
    "decoding",
    "experiment",
    "learning",
    "model",
    "parallel",
    "text",
    "training",
  },
  "scoring": {"checkpoint", "data"},
  "stages": {"checkpoint"},
  "__init__": {"llama", "text"},
}
TOP_NOUNS = {
  "__init__",
  "answers",
  "batch",
  "compatibility",
  "completion",
  "errors",
  "experiment",
  "huge_pages",
  "learning",
  "llama",
  "run",
  "scoring",
  "shell",
  "stages",
  "terminal",
}
VERBS = {p.stem for p in PACKAGE.glob("*.py")} - TOP_NOUNS
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str, module: str) -> set[str]:
  """Whole names of all that a module's source imports, wherever it stands."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{module}: imports are absolute here"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def room(name: str) -> str | None:
  """llama_jax.model.config -> model; None for what is not ours."""
  parts = name.split(".")
  return parts[1] if parts[0] == "llama_jax" and len(parts) > 1 else None


def allowed(here: str) -> set[str]:
  if here in VERBS:
    return (set(BELOW) - {"__init__"}) | {here}
  return BELOW[here] | {here, "errors"}


def wrong_arrows(source: str, here: str) -> set[str]:
  found = {room(name) for name in imported(source, here)} - {None}
  return found - allowed(here)


@pytest.mark.parametrize(
  "path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_arrows_point_down(path):
  relative = path.relative_to(PACKAGE)
  here = relative.parts[0] if len(relative.parts) > 1 else path.stem
  assert here in BELOW or here in VERBS, f"{here} is not in the table"
  assert not wrong_arrows(path.read_text(), here)


def test_a_wrong_arrow_is_seen():
  assert wrong_arrows("def f():\n  from llama_jax import model", "kernels")
  assert wrong_arrows("import llama_jax.checkpoint.store", "training")
  assert wrong_arrows("from llama_jax.train import main", "evaluate")
  assert not wrong_arrows("from llama_jax import errors", "kernels")


def test_all_rooms_are_in_the_table():
  folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
  assert folders <= set(BELOW)
  assert {"train", "generate", "evaluate", "convert"} <= VERBS


def test_no_room_without_a_meaning():
  vague = {"utils", "util", "common", "helpers", "base", "misc"}
  names = {p.stem for p in MODULES} | {p.parent.name for p in MODULES}
  assert not names & vague


@pytest.mark.parametrize(
  "path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_other_framework_is_named(path):
  tops = {n.split(".")[0] for n in imported(path.read_text(), path.stem)}
  assert not tops & {"tensorflow", "torch", "transformers", "keras"}


def test_no_other_framework_comes_along():
  """Nor through what we depend on; and the front door is light."""
  code = (
    "import sys, llama_jax\n"
    "light = sorted({'jax', 'matplotlib', 'grain', 'orbax', 'flax'}"
    " & set(sys.modules))\n"
    "import llama_jax.train, llama_jax.generate, llama_jax.evaluate\n"
    "import llama_jax.convert, llama_jax.llama\n"
    "late = sorted({'matplotlib', 'grain', 'orbax', 'tensorboardX'}"
    " & set(sys.modules))\n"
    "heavy = sorted({'tensorflow', 'torch'} & set(sys.modules))\n"
    "print(light, late, heavy)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=PACKAGE.parent,
  )
  assert done.stdout == "[] [] []\n", done.stdout + done.stderr
