"""Text into packed rows of tokens on disk; and a look at them; a tokenizer.

  python -m llama_jax.prepare --config=configs/data/....py --out=DIR
    [--config.row_length=4096 ...]
  python -m llama_jax.prepare --show=DIR [--rows=3 --seed=0]
  python -m llama_jax.prepare --train_tokenizer=OUT.model --text=PATHS
    [--vocab_size=32000 --sample_bytes=200000000 --seed=0]

The first reads JSONL, Parquet, plain text (.gz, .zst too) and datasets of
tensorflow-datasets, filters them, drops exact duplicates, holds a share out,
and writes rows that training reads and tfds.builder_from_directory opens. DIR
appears when it is whole; what was stopped goes on with the same command. Its
knobs are those of llama_jax/data/parts.py.

The second prints rows decoded: the borders of documents, special tokens and
what is not in the loss, in colours on a terminal (NO_COLOR is heeded).

The third trains a SentencePiece BPE with the settings of Llama 2's: digits
split, bytes for what has no piece, lossless. PATHS: files as above, or
folders; several with commas between. Each is a domain of the report; of one
folder alone, each folder and JSONL file in it, and its text files together.
"""

import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from llama_jax import errors, shell

_COLUMNS = (
  "source",
  "documents",
  "duplicates",
  "filtered",
  "bad",
  "MB",
  "tokens",
  "bytes/token",
  "rows",
  "fill",
)


def make_config(given):
  """The PrepareConfig of a ConfigDict."""
  from llama_jax.data import parts

  values = given.to_dict()
  values["sources"] = {
    name: shell.section(parts.SourceConfig, source, f"sources.{name}")
    for name, source in given.sources.items()
  }
  return shell.section(parts.PrepareConfig, values, "")


def prepare(config, out: pathlib.Path) -> None:
  """Makes the folder, with a bar for each source, and prints its report."""
  import tqdm

  from llama_jax.data import preparation, prepared

  there = (out / prepared.REPORT).exists()
  bars: dict[str, tqdm.tqdm] = {}
  tokens = 0

  def tick(name: str, position: int, total: int) -> None:
    if name not in bars:
      bars[name] = tqdm.tqdm(
        total=total,
        desc=name,
        unit="B",
        unit_scale=True,
        disable=None,
        position=0,
      )
    # Parquet is read from its end.
    bars[name].update(max(position - bars[name].n, 0))

  def tell(more: int) -> None:
    nonlocal tokens
    tokens += more
    for bar in bars.values():
      bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)

  try:
    report = preparation.prepare(config, out, tick, tell)
  finally:
    for bar in bars.values():
      bar.close()
  for line in table(report):
    print(line)
  for name, counted in report["sources"].items():
    for bad in counted["bad_named"]:
      print(f"skipped in {name}: {bad}")
    if counted["passed_over"]:
      print(f"{name}: {counted['passed_over']} files that are no text")
  print(f"{out} was there already" if there else f"written to {out}")


def table(report: Mapping[str, Any]) -> Iterator[str]:
  """The report, a line a source and one for what each holds out."""
  rows = [_COLUMNS]
  for name, counted in report["sources"].items():
    for side in ("train", "heldout"):
      one = counted[side]
      if not one["rows"]:
        continue
      read = ("duplicates", "filtered", "bad") if side == "train" else ()
      room = one["rows"] * (report["row_length"] + 1)
      rows.append(
        (
          name if side == "train" else "  held out",
          f"{one['documents']:,}",
          *([f"{counted[key]:,}" for key in read] or [""] * 3),
          f"{one['text_bytes'] / 1e6:,.2f}",
          f"{one['tokens']:,}",
          f"{one['text_bytes'] / one['tokens']:.3f}",
          f"{one['rows']:,}",
          f"{one['used'] / room:.2%}",
        )
      )
      if cut := one["psm"] + one["spm"]:
        rows.append(
          (
            f"  infilled: {cut:,} documents, {one['psm']:,} PSM,"
            f" {one['spm']:,} SPM",
          )
        )
  full = [row for row in rows if len(row) > 1]
  widths = [max(map(len, column)) for column in zip(*full, strict=True)]
  for row in rows:
    if len(row) == 1:
      yield row[0]
    else:
      cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
      yield "  ".join([row[0].ljust(widths[0]), *cells])


def show(folder: str, rows: int, seed: int) -> None:
  from llama_jax.data import display, prepared

  colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
  for line in display.lines(prepared.read(folder), rows, seed, colours):
    print(line)


def main(argv) -> None:
  del argv
  asked = [
    name
    for name in ("out", "show", "train_tokenizer")
    if flags.FLAGS[name].value
  ]
  if len(asked) != 1:
    raise errors.UserError(
      "give one of --out=DIR (with --config=FILE), --show=DIR and"
      " --train_tokenizer=OUT.model (with --text=PATHS)."
    )
  if _SHOW.value:
    show(_SHOW.value, _ROWS.value, _SEED.value)
  elif _OUT.value:
    if _CONFIG.value is None:
      raise errors.UserError(
        "--out needs --config=FILE; the recipes are in configs/data/."
      )
    prepare(make_config(_CONFIG.value), pathlib.Path(_OUT.value).expanduser())
  else:
    from llama_jax.data import vocabulary

    if not _TEXT.value:
      raise errors.UserError(
        "--text=PATHS is needed: JSONL or text, .gz too, or folders."
      )
    vocabulary.train(
      pathlib.Path(_TRAIN_TOKENIZER.value).expanduser(),
      _TEXT.value,
      _VOCAB_SIZE.value,
      _SAMPLE_BYTES.value,
      _SEED.value,
    )


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "What to prepare.")
  _OUT = flags.DEFINE_string("out", None, "The folder to write.")
  _SHOW = flags.DEFINE_string("show", None, "A prepared folder to look at.")
  _ROWS = flags.DEFINE_integer("rows", 3, "To show of each source.", 1)
  _TRAIN_TOKENIZER = flags.DEFINE_string(
    "train_tokenizer", None, "The tokenizer.model to write."
  )
  _TEXT = flags.DEFINE_string("text", None, "JSONL, text, gz or folders.")
  _VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 32000, "Pieces, with 256 bytes and 3 special ones.", 260
  )
  _SAMPLE_BYTES = flags.DEFINE_integer(
    "sample_bytes", 200_000_000, "Train on about this much at the most.", 1
  )
  _SEED = flags.DEFINE_integer("seed", 0, "Of the sample, or of what is shown.")
  shell.run(main)
