"""Prepares any text: a file, a folder, or several with commas between.

  python -m llama_jax.prepare --config=configs/data/folder.py --out=DIR \\
    --config.tokenizer=PATH --config.sources.text.paths=FILE_OR_FOLDER

Source: none; every number is ours.
Expected: a table with one source, its rows filled to 99 % or more, but for
the last row of each 16 MB of text.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "tokenizer": "",
      "row_length": 2048,
      "seed": 0,
      "heldout": 0.01,
      "infill_rate": 0.0,
      "bad_lines": 0,
      "max_document_mb": 64.0,
      "min_characters": 1,
      "max_characters": 0,
      "shard_mb": 16.0,
      "workers": 0,
      "sources": {
        "text": {"paths": "", "format": "", "field": "text", "split": "train"}
      },
    }
  )
