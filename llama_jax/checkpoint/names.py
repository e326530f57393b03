"""One table of weight names, and the walk over it.

Every weight format is a column of TABLE. A tensor of a file goes to one place
of our tree and back by the row's reshape, so reading and writing are a
bijection, and a tensor that has no row is an error and never a guess.
weights.py carries the tensors along this walk.

Shapes: V vocab, D embed, Q num_heads * head_dim, K num_kv_heads * head_dim,
F mlp, H head dim, L layers, 1 one. Files keep a linear layer as [out, in]; our
kernels are [in, out], stacked over layers on axis 0.

To add a format: a column here, a line in SCHEMES, one module that makes a
weights.Source of it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax import errors
from llama_jax.model import config as config_lib

AS_IS = "as is"
TRANSPOSE = "transpose"
ROTARY = "rotary transpose"


@dataclasses.dataclass(frozen=True)
class Row:
  """One weight: where it lives in our tree and in each format.

  Attributes:
    path: our path; under layers/ it is stacked over layers.
    hugging_face: the transformers name.
    gguf: the llama.cpp name, or None where the format has none.
    meta: the name in Meta's consolidated.*.pth, or None.
    reshape: AS_IS; TRANSPOSE, [out, in] -> [in, out]; ROTARY, the same with
      the rows of each head also brought into our RoPE layout.
    axes: letters of our shape, without L.
  """

  path: str
  hugging_face: str
  gguf: str | None
  meta: str | None
  reshape: str
  axes: str


# fmt: off
TABLE = (
  Row("embed/embedding", "model.embed_tokens.weight",
      "token_embd.weight",
      "tok_embeddings.weight", AS_IS, "VD"),
  Row("layers/attention_norm/scale",
      "model.layers.{layer}.input_layernorm.weight",
      "blk.{layer}.attn_norm.weight",
      "layers.{layer}.attention_norm.weight", AS_IS, "D"),
  Row("layers/attention/query/kernel",
      "model.layers.{layer}.self_attn.q_proj.weight",
      "blk.{layer}.attn_q.weight",
      "layers.{layer}.attention.wq.weight", ROTARY, "DQ"),
  Row("layers/attention/key/kernel",
      "model.layers.{layer}.self_attn.k_proj.weight",
      "blk.{layer}.attn_k.weight",
      "layers.{layer}.attention.wk.weight", ROTARY, "DK"),
  Row("layers/attention/value/kernel",
      "model.layers.{layer}.self_attn.v_proj.weight",
      "blk.{layer}.attn_v.weight",
      "layers.{layer}.attention.wv.weight", TRANSPOSE, "DK"),
  Row("layers/attention/out/kernel",
      "model.layers.{layer}.self_attn.o_proj.weight",
      "blk.{layer}.attn_output.weight",
      "layers.{layer}.attention.wo.weight", TRANSPOSE, "QD"),
  Row("layers/mlp_norm/scale",
      "model.layers.{layer}.post_attention_layernorm.weight",
      "blk.{layer}.ffn_norm.weight",
      "layers.{layer}.ffn_norm.weight", AS_IS, "D"),
  Row("layers/mlp/gate/kernel",
      "model.layers.{layer}.mlp.gate_proj.weight",
      "blk.{layer}.ffn_gate.weight",
      "layers.{layer}.feed_forward.w1.weight", TRANSPOSE, "DF"),
  Row("layers/mlp/up/kernel",
      "model.layers.{layer}.mlp.up_proj.weight",
      "blk.{layer}.ffn_up.weight",
      "layers.{layer}.feed_forward.w3.weight", TRANSPOSE, "DF"),
  Row("layers/mlp/down/kernel",
      "model.layers.{layer}.mlp.down_proj.weight",
      "blk.{layer}.ffn_down.weight",
      "layers.{layer}.feed_forward.w2.weight", TRANSPOSE, "FD"),
  Row("final_norm/scale", "model.norm.weight",
      "output_norm.weight",
      "norm.weight", AS_IS, "D"),
  Row("head/kernel", "lm_head.weight", "output.weight",
      "output.weight", TRANSPOSE, "DV"),
  Row("score/kernel", "score.weight", None, None, TRANSPOSE, "D1"),
)
# fmt: on

EMBED_PATH = "embed/embedding"
HEAD_PATH = "head/kernel"
SCORE_PATH = "score/kernel"
FINAL_NORM_PATH = "final_norm/scale"

# What fixes the length of an axis, as a user would type it.
OWNERS = {
  "V": ("vocab_size",),
  "D": ("embed_dim",),
  "Q": ("num_heads", "head_dim"),
  "K": ("num_kv_heads", "head_dim"),
  "F": ("mlp_dim",),
  "1": (),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
  """What sets one weight format apart.

  Attributes:
    column: the attribute of Row that holds this format's names.
    interleaved: RoPE rotates pairs (2i, 2i + 1), not (i, i + H / 2).
    ignored: pattern -> why a tensor of that name may be left out.
  """

  column: str
  interleaved: bool
  ignored: Mapping[str, str]


SCHEMES = {
  "hf": Scheme(
    column="hugging_face",
    interleaved=False,
    ignored={
      r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": (
        "recomputed from rope_theta"
      ),
    },
  ),
  "gguf": Scheme(
    column="gguf",
    interleaved=True,
    ignored={
      r"rope_freqs\.weight": "read as model.rope_scaling",
      r"blk\.\d+\.attn_rot_embd(\.weight)?": "recomputed from rope_theta",
    },
  ),
  "meta": Scheme(
    column="meta",
    interleaved=True,
    ignored={r"rope\.freqs": "recomputed from rope_theta"},
  ),
}

# What weights may be kept as, in the formats' own words.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Place:
  """One tensor of a file and its place in our tree.

  Attributes:
    name: in the file.
    row: its line of TABLE.
    layer: index on our axis 0, or None for a weight outside the layers.
    shape: in the file.
  """

  name: str
  row: Row
  layer: int | None
  shape: tuple[int, ...]


def axis_sizes(config: config_lib.LlamaConfig) -> dict[str, int]:
  """The length that each axis letter has under this configuration."""
  sizes = {}
  for letter, fields in OWNERS.items():
    sizes[letter] = 1
    for field in fields:
      sizes[letter] *= getattr(config, field)
  return sizes


def our_shape(config: config_lib.LlamaConfig, row: Row) -> tuple[int, ...]:
  """The shape of a leaf of our tree, L included."""
  sizes = axis_sizes(config)
  shape = tuple(sizes[letter] for letter in row.axes)
  return (config.num_layers, *shape) if stacked(row) else shape


def output_path(config: config_lib.LlamaConfig) -> str:
  """Of the leaf that the last hidden states are multiplied with."""
  if config.head == "scalar":
    return SCORE_PATH
  return EMBED_PATH if config.tied_embeddings else HEAD_PATH


def rows(config: config_lib.LlamaConfig) -> tuple[Row, ...]:
  """The rows of TABLE that this configuration has."""
  last = output_path(config)
  return tuple(
    row
    for row in TABLE
    if row.path == last or row.path not in (HEAD_PATH, SCORE_PATH)
  )


def places(config: config_lib.LlamaConfig, scheme: str) -> Iterator[Place]:
  """Every tensor that a file of this scheme must hold, layer by layer.

  Raises:
    ConfigError: the scheme has no name for one of them.
  """
  column = SCHEMES[scheme].column
  sizes = axis_sizes(config)

  def place(row: Row, layer: int | None) -> Place:
    axes = row.axes if row.reshape == AS_IS else row.axes[::-1]
    name = getattr(row, column).format(layer=layer)
    return Place(name, row, layer, tuple(sizes[a] for a in axes))

  table = rows(config)
  if any(getattr(row, column) is None for row in table):
    raise errors.ConfigError(
      f"model.head={config.head} is a reward model, and {scheme}: has no place"
      " for its score; use hf: or orbax:."
    )
  first = next(i for i, row in enumerate(table) if stacked(row))
  inner = [row for row in table if stacked(row)]
  yield from (place(row, None) for row in table[:first])
  for layer in range(config.num_layers):
    yield from (place(row, layer) for row in inner)
  yield from (place(row, None) for row in table[first + len(inner) :])


def change_rope_layout(
  rows_OI: np.ndarray, head_dim: int, *, to: str
) -> np.ndarray:
  """Permutes the rows of a query or key weight between the RoPE layouts.

  The only place that knows the permutation. In "interleaved" RoPE rotates the
  pair (2i, 2i + 1) of a head, in "halves" the pair (i, i + head_dim / 2).

  Args:
    rows_OI: [heads * head_dim, ...].
    head_dim: width of one head.
    to: "halves" (from interleaved) or "interleaved" (from halves).
  """
  split = {"halves": (head_dim // 2, 2), "interleaved": (2, head_dim // 2)}[to]
  heads = rows_OI.reshape(-1, *split, *rows_OI.shape[1:])
  return heads.swapaxes(1, 2).reshape(rows_OI.shape)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a/b": leaf} of a nested dict."""
  leaves = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      leaves.update(flatten(value, f"{prefix}{key}/"))
    else:
      leaves[f"{prefix}{key}"] = value
  return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of flatten."""
  tree: dict[str, Any] = {}
  for path, value in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def stacked(row: Row) -> bool:
  """Whether our leaf holds this weight of every layer, on axis 0."""
  return row.path.startswith("layers/")


def name_of(path: str, scheme: str) -> str:
  """What a scheme calls the weight at a path of ours."""
  row = next(row for row in TABLE if row.path == path)
  return getattr(row, SCHEMES[scheme].column)
