"""Prepares the sources of a paper's pretraining, a folder for each.

  python -m llama_jax.prepare --out=DIR \\
    --config=configs/data/pretrain.py:RECIPE:FOLDER --config.tokenizer=PATH

RECIPE is llama1, llama2, llama3, codellama or python; FOLDER holds a folder for
each source, with JSONL, Parquet or text (.gz, .zst too); or a source is named
by itself: --config.sources.code.paths=A.jsonl.gz,B.parquet.

Source: the sources are those that configs/pretrain mixes: arXiv:2302.13971,
table 1 (llama1); arXiv:2308.12950, table 1 and 2.3 (codellama, with infilling
of 0.9, and python); arXiv:2407.21783, 3.1.2 (llama3). Llama 2's are not
published: one, named text. Rows are as long as the longest sequence of the
recipe; llama3's can be cut into those of 4,096 too. The other numbers are ours.
Expected: a table with a line for each source, its rows filled to 99 % or more.
"""

import ml_collections

# recipe -> (sources, tokens of a row, infilling).
_RECIPES = {
  "llama1": (
    (
      "commoncrawl",
      "c4",
      "github",
      "wikipedia",
      "books",
      "arxiv",
      "stackexchange",
    ),
    2048,
    0.0,
  ),
  "llama2": (("text",), 4096, 0.0),
  "llama3": (("general", "maths", "code", "multilingual"), 8192, 0.0),
  "codellama": (("code", "code_text", "text"), 4096, 0.9),
  "python": (("python", "code", "code_text", "text"), 4096, 0.0),
}


def get_config(argument: str = "llama3") -> ml_collections.ConfigDict:
  recipe, _, folder = argument.partition(":")
  if recipe not in _RECIPES:
    raise ValueError(
      f"configs/data/pretrain.py:{recipe} is not there; use"
      f" {', '.join(_RECIPES)}, and :FOLDER behind it."
    )
  sources, row_length, infill_rate = _RECIPES[recipe]
  return ml_collections.ConfigDict(
    {
      "tokenizer": "",
      "row_length": row_length,
      "seed": 0,
      "heldout": 0.005,
      "infill_rate": infill_rate,
      "bad_lines": 100,
      "max_document_mb": 64.0,
      "min_characters": 50,
      "max_characters": 0,
      "shard_mb": 16.0,
      "workers": 0,
      "sources": {
        source: {
          "paths": f"{folder}/{source}" if folder else "",
          "format": "",
          "field": "text",
          "split": "train",
        }
        for source in sources
      },
    }
  )
