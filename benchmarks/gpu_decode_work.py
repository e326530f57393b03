"""The work that both sides of the GPU decoding benchmark do: numbers alone."""

from typing import Any

import gpu_weights
import numpy as np


def ids(vocab_size: int, rows: int, length: int, seed: int) -> np.ndarray:
  """Random tokens, int32 [rows, length]."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, vocab_size, (rows, length), dtype=np.int32)


def requests(
  vocab_size: int,
  count: int,
  prompts: tuple[int, int],
  answers: tuple[int, int],
  seed: int,
) -> list[tuple[list[int], int]]:
  """(prompt, tokens of its answer) of requests, their lengths even in range.

  Lengths are the same for every seed, so that one may warm up with another.
  """
  rng = np.random.default_rng(0)
  read, drawn = (
    rng.integers(least, most + 1, count) for least, most in (prompts, answers)
  )
  words = ids(vocab_size, count, prompts[1], seed)
  return [
    (row[:length].tolist(), int(new))
    for row, length, new in zip(words, read, drawn, strict=True)
  ]


def tokens(config: dict[str, Any], spec: dict[str, Any]) -> int:
  """Of which a call's seconds are."""
  if spec["kind"] == "decode":
    return spec["rows"]
  if spec["kind"] == "prefill":
    return spec["rows"] * spec["cached"]
  asked = requests(
    config["vocab_size"], spec["rows"], spec["prompts"], spec["answers"], 0
  )
  return sum(new for _, new in asked)


def _matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
  """Path -> (in, out) of all that a token is multiplied with.

  A tied embedding is the head; one of its own is only looked up in.
  """
  found = {
    path: shape
    for path, shape in gpu_weights.shapes(config).items()
    if path.endswith("kernel")
  }
  if config["tied_embeddings"]:
    found["head.kernel"] = (config["embed_dim"], config["vocab_size"])
  return found


def weight_bytes(config: dict[str, Any]) -> dict[str, int]:
  """Bytes of weights that a decoded token needs, by their dtype."""
  matrices = _matrices(config).values()
  count = sum(wide * high for wide, high in matrices)
  # A float32 scale for each row of the matrix as it lies, [out, in].
  scales = sum(out for _, out in matrices)
  return {"bfloat16": 2 * count, "int8": count + 4 * scales}


def token_bytes(config: dict[str, Any]) -> int:
  """Bytes of keys and values of one token in bfloat16."""
  heads = config["num_layers"] * config["num_kv_heads"]
  return 2 * 2 * heads * config["head_dim"]


def prefill_flops(config: dict[str, Any], length: int) -> int:
  """FLOPs from a prompt to its next token's logits.

  Two for each weight and token, the head for the last token alone; causal
  attention at half of its square.
  """
  total = 0
  for path, (wide, high) in _matrices(config).items():
    tokens = 1 if path.startswith("head") else length
    total += 2 * tokens * wide * high
  width = config["num_heads"] * config["head_dim"]
  return total + 2 * config["num_layers"] * length**2 * width


def short_of_best(logits_BTV, ids_BT, prompt: int) -> list[float]:
  """How far each row's tokens after the prompt lie below the best at most.

  Of the logits' spread: 0 for a row that is greedy under these logits.
  """
  chosen_BN1 = ids_BT[:, prompt:, None]
  before_BNV = logits_BTV[:, prompt - 1 : -1]
  got_BN = np.take_along_axis(before_BNV, chosen_BN1, axis=-1)[..., 0]
  short_BN = before_BNV.max(-1) - got_BN
  return [float(x) for x in short_BN.max(-1) / before_BNV.std()]
