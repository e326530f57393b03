"""Prepares four domains, to be mixed as Llama 3's were.

  python -m llama_jax.prepare --out=DIR \\
    --config=configs/data/pretrain.py:FOLDER --config.tokenizer=PATH

FOLDER holds general/, maths/, code/ and multilingual/, each a folder of JSONL,
Parquet or text (.gz, .zst too); or every domain is named by itself:
--config.sources.general.paths=A.jsonl.gz,B.parquet.

Source: the domains are those of arXiv:2407.21783, 3.1.2 (50 % general
knowledge, 25 % maths and reasoning, 17 % code, 8 % multilingual, which are
data.mixture in training). The other numbers are ours: a row of 8,192 can be
cut into sequences of 4,096 too, as Llama 3's batches grow.
Expected: a table with a line for each domain, its rows filled to 99 % or more.
"""

import ml_collections

DOMAINS = ("general", "maths", "code", "multilingual")


def get_config(folder: str = "") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "tokenizer": "",
      "row_length": 8192,
      "seed": 0,
      "heldout": 0.005,
      "infill_rate": 0.0,
      "bad_lines": 100,
      "max_document_mb": 64.0,
      "min_characters": 50,
      "max_characters": 0,
      "shard_mb": 16.0,
      "workers": 0,
      "sources": {
        domain: {
          "paths": f"{folder}/{domain}" if folder else "",
          "format": "",
          "field": "text",
          "split": "train",
        }
        for domain in DOMAINS
      },
    }
  )
