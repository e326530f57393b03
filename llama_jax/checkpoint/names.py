"""One table of weight names, and the two walks over it.

Every weight format is a column of TABLE. A tensor of a file goes to one place
of our tree and back by the row's reshape, so reading and writing are a
bijection, and a tensor that has no row is an error and never a guess.

Shapes: V vocab, D embed, Q num_heads * head_dim, K num_kv_heads * head_dim,
F mlp, H head dim, L layers. Files keep a linear layer as [out, in]; our
kernels are [in, out], stacked over layers on axis 0.

To add a format: a column here, a line in SCHEMES, one module that makes a
Source.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
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
    gguf: the llama.cpp name.
    reshape: AS_IS; TRANSPOSE, [out, in] -> [in, out]; ROTARY, the same with
      the rows of each head also brought into our RoPE layout.
    axes: letters of our shape, without L.
  """

  path: str
  hugging_face: str
  gguf: str
  reshape: str
  axes: str


# fmt: off
TABLE = (
  Row("embed/embedding", "model.embed_tokens.weight",
      "token_embd.weight", AS_IS, "VD"),
  Row("layers/attention_norm/scale",
      "model.layers.{layer}.input_layernorm.weight",
      "blk.{layer}.attn_norm.weight", AS_IS, "D"),
  Row("layers/attention/query/kernel",
      "model.layers.{layer}.self_attn.q_proj.weight",
      "blk.{layer}.attn_q.weight", ROTARY, "DQ"),
  Row("layers/attention/key/kernel",
      "model.layers.{layer}.self_attn.k_proj.weight",
      "blk.{layer}.attn_k.weight", ROTARY, "DK"),
  Row("layers/attention/value/kernel",
      "model.layers.{layer}.self_attn.v_proj.weight",
      "blk.{layer}.attn_v.weight", TRANSPOSE, "DK"),
  Row("layers/attention/out/kernel",
      "model.layers.{layer}.self_attn.o_proj.weight",
      "blk.{layer}.attn_output.weight", TRANSPOSE, "QD"),
  Row("layers/mlp_norm/scale",
      "model.layers.{layer}.post_attention_layernorm.weight",
      "blk.{layer}.ffn_norm.weight", AS_IS, "D"),
  Row("layers/mlp/gate/kernel",
      "model.layers.{layer}.mlp.gate_proj.weight",
      "blk.{layer}.ffn_gate.weight", TRANSPOSE, "DF"),
  Row("layers/mlp/up/kernel",
      "model.layers.{layer}.mlp.up_proj.weight",
      "blk.{layer}.ffn_up.weight", TRANSPOSE, "DF"),
  Row("layers/mlp/down/kernel",
      "model.layers.{layer}.mlp.down_proj.weight",
      "blk.{layer}.ffn_down.weight", TRANSPOSE, "FD"),
  Row("final_norm/scale", "model.norm.weight",
      "output_norm.weight", AS_IS, "D"),
  Row("head/kernel", "lm_head.weight", "output.weight", TRANSPOSE, "DV"),
)
# fmt: on

EMBED_PATH = "embed/embedding"
HEAD_PATH = "head/kernel"

# What fixes the length of an axis, as a user would type it.
_OWNERS = {
  "V": ("vocab_size",),
  "D": ("embed_dim",),
  "Q": ("num_heads", "head_dim"),
  "K": ("num_kv_heads", "head_dim"),
  "F": ("mlp_dim",),
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
}

# What weights may be kept as, in the formats' own words.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, unread.

  Attributes:
    shape: as NumPy sees it, [out, in] for a linear layer.
    dtype: what Source.get returns.
    stored: the format's own word for how it is kept, such as "Q4_1".
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  stored: str


@dataclasses.dataclass(frozen=True)
class Source:
  """Tensors of a checkpoint in its own names and layout, read one at a time.

  Attributes:
    file: what messages call it.
    scheme: a key of SCHEMES.
    tensors: every tensor that the checkpoint holds.
    get: name -> array; raises BadFileError if the bytes cannot be had.
  """

  file: str
  scheme: str
  tensors: Mapping[str, Tensor]
  get: Callable[[str], np.ndarray]


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
  for letter, fields in _OWNERS.items():
    sizes[letter] = 1
    for field in fields:
      sizes[letter] *= getattr(config, field)
  return sizes


def our_shape(config: config_lib.LlamaConfig, row: Row) -> tuple[int, ...]:
  """The shape of a leaf of our tree, L included."""
  sizes = axis_sizes(config)
  shape = tuple(sizes[letter] for letter in row.axes)
  return (config.num_layers, *shape) if _stacked(row) else shape


def rows(config: config_lib.LlamaConfig) -> tuple[Row, ...]:
  """The rows of TABLE that this configuration has."""
  return tuple(
    row
    for row in TABLE
    if not (row.path == HEAD_PATH and config.tied_embeddings)
  )


def places(config: config_lib.LlamaConfig, scheme: str) -> Iterator[Place]:
  """Every tensor that a file of this scheme must hold, layer by layer."""
  column = SCHEMES[scheme].column
  sizes = axis_sizes(config)

  def place(row: Row, layer: int | None) -> Place:
    axes = row.axes if row.reshape == AS_IS else row.axes[::-1]
    name = getattr(row, column).format(layer=layer)
    return Place(name, row, layer, tuple(sizes[a] for a in axes))

  table = rows(config)
  first = next(i for i, row in enumerate(table) if _stacked(row))
  stacked = [row for row in table if _stacked(row)]
  yield from (place(row, None) for row in table[:first])
  for layer in range(config.num_layers):
    yield from (place(row, layer) for row in stacked)
  yield from (place(row, None) for row in table[first + len(stacked) :])


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


def ignored(source: Source, config: config_lib.LlamaConfig) -> dict[str, str]:
  """Tensors of the source that carry nothing, with the reason for each."""
  scheme = SCHEMES[source.scheme]
  reasons = {}
  for name in source.tensors:
    for pattern, why in scheme.ignored.items():
      if re.fullmatch(pattern, name):
        reasons[name] = why
  head = _name_of(HEAD_PATH, source.scheme)
  if config.tied_embeddings and head in source.tensors:
    reasons[head] = "equal to the tied embedding"
  return reasons


def check(config: config_lib.LlamaConfig, source: Source) -> None:
  """Raises BadFileError unless the tensors are those of this configuration.

  Reads no weights, and no more names than the source holds: a forged
  num_layers costs nothing.
  """
  known = set(ignored(source, config))
  for place in places(config, source.scheme):
    found = source.tensors.get(place.name)
    if found is None:
      _refuse_strangers(config, source, known, biases_only=True)
      raise errors.BadFileError(
        f"{source.file} lacks the tensor {place.name} {list(place.shape)},"
        f" which {_demand(config, place)} demands."
      )
    if found.shape != place.shape:
      raise errors.BadFileError(
        f"{source.file}: tensor {place.name} is {list(found.shape)} but"
        f" {_contradicted(config, place, found.shape)} makes it"
        f" {list(place.shape)}."
      )
    if found.dtype not in DTYPES.values():
      raise errors.BadFileError(
        f"{source.file}: tensor {place.name} is {found.stored}; float32,"
        " float16 and bfloat16 are allowed."
      )
    known.add(place.name)
  _refuse_strangers(config, source, known, biases_only=False)


def check_tied(config: config_lib.LlamaConfig, source: Source) -> None:
  """Raises BadFileError if a tied model's file holds another head."""
  embed = _name_of(EMBED_PATH, source.scheme)
  head = _name_of(HEAD_PATH, source.scheme)
  if not config.tied_embeddings or head not in source.tensors:
    return
  same = source.tensors[head].shape == source.tensors[embed].shape
  if not same or not np.array_equal(source.get(head), source.get(embed)):
    raise errors.BadFileError(
      f"{source.file}: the embeddings are declared tied, but {head} differs"
      f" from {embed}; declare them untied (tie_word_embeddings=false)."
    )


def read_params(
  config: config_lib.LlamaConfig, source: Source
) -> dict[str, Any]:
  """Our nested tree of stacked arrays from a source's tensors.

  A leaf keeps the source's dtype; where the layers of one leaf differ in
  dtype it is float32, which holds them all exactly. Peak memory is the result
  and one tensor.

  Raises:
    BadFileError: a tensor is missing, unexpected or of a wrong shape.
  """
  check(config, source)
  check_tied(config, source)
  all_places = list(places(config, source.scheme))
  dtypes: dict[str, set[np.dtype]] = {}
  for place in all_places:
    dtype = source.tensors[place.name].dtype
    dtypes.setdefault(place.row.path, set()).add(dtype)

  leaves: dict[str, np.ndarray] = {}
  for place in all_places:
    path, kinds = place.row.path, dtypes[place.row.path]
    dtype = next(iter(kinds)) if len(kinds) == 1 else np.dtype(np.float32)
    value = _to_ours(config, place, source.get(place.name), source.scheme)
    if place.layer is None:
      leaves[path] = np.ascontiguousarray(value, dtype)
      continue
    if path not in leaves:
      leaves[path] = np.empty(our_shape(config, place.row), dtype)
    leaves[path][place.layer] = value
  return nest(leaves)


def write_tensors(
  config: config_lib.LlamaConfig, scheme: str, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of every tensor of a file, in the scheme's own layout.

  Args:
    config: the model's configuration.
    scheme: a key of SCHEMES.
    params: our tree; NumPy or addressable JAX arrays.

  Raises:
    BadFileError: the tree is not that of the configuration.
  """
  leaves = flatten(params)
  check_params(config, params)
  for place in places(config, scheme):
    leaf = leaves[place.row.path]
    value = np.asarray(leaf if place.layer is None else leaf[place.layer])
    yield place.name, from_ours(config, place, value, scheme)


def from_ours(
  config: config_lib.LlamaConfig, place: Place, value: np.ndarray, scheme: str
) -> np.ndarray:
  """One layer of one leaf as the scheme's file keeps it."""
  if place.row.reshape == AS_IS:
    return np.ascontiguousarray(value)
  value = np.ascontiguousarray(value.T)
  if place.row.reshape == ROTARY and SCHEMES[scheme].interleaved:
    value = change_rope_layout(value, config.head_dim, to="interleaved")
  return value


def check_params(
  config: config_lib.LlamaConfig, params: Mapping[str, Any]
) -> None:
  """Raises BadFileError unless the tree is that of the configuration."""
  leaves = flatten(params)
  shapes = {row.path: our_shape(config, row) for row in rows(config)}
  if missing := sorted(set(shapes) - set(leaves)):
    raise errors.BadFileError(
      f"params lack {', '.join(missing)}, which the configuration demands"
      f" (model.tied_embeddings={config.tied_embeddings})."
    )
  if unexpected := sorted(set(leaves) - set(shapes)):
    raise errors.BadFileError(
      f"params hold {', '.join(unexpected)}, which the configuration has no"
      f" place for (model.tied_embeddings={config.tied_embeddings})."
    )
  for path, shape in shapes.items():
    if tuple(leaves[path].shape) != shape:
      raise errors.BadFileError(
        f"params {path} is {list(leaves[path].shape)} but the configuration"
        f" makes it {list(shape)}."
      )
    if np.dtype(leaves[path].dtype) not in DTYPES.values():
      raise errors.BadFileError(
        f"params {path} is {leaves[path].dtype}; float32, float16 and"
        " bfloat16 are allowed."
      )


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


def _stacked(row: Row) -> bool:
  return row.path.startswith("layers/")


def _name_of(path: str, scheme: str) -> str:
  row = next(row for row in TABLE if row.path == path)
  return getattr(row, SCHEMES[scheme].column)


def _to_ours(
  config: config_lib.LlamaConfig, place: Place, value: np.ndarray, scheme: str
) -> np.ndarray:
  """The inverse of from_ours; a view where no row moves."""
  if place.row.reshape == AS_IS:
    return value
  if place.row.reshape == ROTARY and SCHEMES[scheme].interleaved:
    value = change_rope_layout(value, config.head_dim, to="halves")
  return value.T


def _demand(config: config_lib.LlamaConfig, place: Place) -> str:
  if place.layer is not None:
    return f"model.num_layers={config.num_layers}"
  if place.row.path == HEAD_PATH:
    return "model.tied_embeddings=False"
  return "every Llama"


def _contradicted(
  config: config_lib.LlamaConfig, place: Place, found: tuple[int, ...]
) -> str:
  """The configuration values that a tensor's shape is at odds with."""
  axes = place.row.axes
  axes = axes if place.row.reshape == AS_IS else axes[::-1]
  wrong = axes
  if len(found) == len(place.shape):
    triples = zip(axes, found, place.shape, strict=True)
    wrong = [axis for axis, have, want in triples if have != want]
  return " and ".join(
    " x ".join(
      f"model.{name}={getattr(config, name)}" for name in _OWNERS[axis]
    )
    for axis in wrong
  )


def _refuse_strangers(
  config: config_lib.LlamaConfig,
  source: Source,
  known: set[str],
  *,
  biases_only: bool,
) -> None:
  """Raises BadFileError for a tensor that has no place in our tree."""
  strangers = sorted(set(source.tensors) - known)
  biases = [name for name in strangers if name.endswith(".bias")]
  if biases:
    raise errors.BadFileError(
      f"{source.file} is not a Llama: it holds the bias {biases[0]}"
      f" ({len(biases)} biases in all), and no Llama has biases."
    )
  if biases_only or not strangers:
    return
  name = strangers[0]
  shape = list(source.tensors[name].shape)
  column = SCHEMES[source.scheme].column
  for row in TABLE:
    pattern = re.escape(getattr(row, column)).replace(r"\{layer\}", r"(\d+)")
    if _stacked(row) and re.fullmatch(pattern, name):
      raise errors.BadFileError(
        f"{source.file} holds the tensor {name} {shape}, which is beyond"
        f" model.num_layers={config.num_layers}."
      )
  raise errors.BadFileError(
    f"{source.file} holds the tensor {name} {shape}"
    f" ({len(strangers)} unknown in all), which has no place in a Llama"
    f" with model.num_layers={config.num_layers}."
  )
