"""Writes llama3_ids.json: what Meta's own class makes of nasty texts.

  python make_llama3_ids.py llama3_tokenizer.tiktoken

Needs llama-models 0.3.0 (and tiktoken), of which the project uses nothing. Of
long texts only the number of ids and their hash are kept.
"""

import hashlib
import json
import pathlib
import sys

from llama_models.llama3 import tokenizer as peer_lib

# Each text is its parts, joined: [what, how often].
TEXTS = [
  [],
  [[" ", 1]],
  [["Hello world", 1]],
  [["  two  spaces  ", 1]],
  [["don't WE'LL I'm", 1]],
  [["tabs\tand\r\nCRLF\n\n\nlines\n", 1]],
  [["1234567890 and 3.14159, 1,000,000 or 20 2x4", 1]],
  [["٣٤٥ ½ Ⅷ ² 一二三", 1]],
  [["السلام عليكم ورحمة الله", 1]],
  [["你好，世界。今天天气很好。", 1]],
  [["👩‍👩‍👧‍👦 🇫🇷 🤷🏽‍♀️ ☃", 1]],
  [["e\u0301 é \u00a0 \u200b \ufeff \u3000", 1]],
  [["NUL \0 and \x01\x7f\x80", 1]],
  [["def f(x):\n    return x ** 2  # 16\n", 1]],
  [["<|eot_id|> <|begin_of_text|><|reserved_special_token_7|>", 1]],
  [["\ue000\uf8ff\U0010ffff", 1]],
  [["x", 5000]],
  [["3", 300]],
  # Over the lengths at which Meta's class cuts a text.
  [["x", 100_000]],
  [["abc1.é", 20_000]],
  [[" ", 60_001], ["end", 1]],
  [
    ["word ", 3],
    ["z", 25_001],
    [" then\n", 2],
    ["\t ", 12_501],
    ["你", 30_000],
  ],
  [["y", 25_000], [" ", 25_000], ["y", 25_000]],
  [["some words, ", 50_000]],
  [["a", 399_990], [" longer than one piece", 3]],
]


def main(path):
  peer = peer_lib.Tokenizer(pathlib.Path(path))
  made = []
  for parts in TEXTS:
    text = "".join(what * times for what, times in parts)
    ids = peer.encode(text, bos=False, eos=False)
    entry = {"parts": parts, "count": len(ids)}
    if len(ids) < 200:
      entry["ids"] = ids
    else:
      entry["sha256"] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    made.append(entry)
  target = pathlib.Path(__file__).with_name("llama3_ids.json")
  golden = {
    "special_tokens": peer.special_tokens,
    "stop_tokens": sorted(peer.stop_tokens),
    "texts": made,
  }
  target.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])
