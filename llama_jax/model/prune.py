"""A smaller model cut out of a larger one, by what each part does on text.

Meta pruned Llama 3.2's 1B and 3B from 8B, in a way it has not published. This
is what others have of structured pruning of Llamas, in one cut from one
measurement:

  layers          1 - the cosine of what enters and what leaves one
                  (arXiv:2403.03853)
  MLP channels,   their mean activation's norm (arXiv:2407.14679, 2408.11796),
  query heads     here times the weights that it leaves through, as in
                  arXiv:2306.11695: the norm of what they add to the stream
  embedding       mean magnitude behind the norms (arXiv:2407.14679), here with
  channels        every norm counting alike

A key and value head goes with all of its query heads. Ours is the last step:
norms divide by the root of a mean over channels, so that their scales are
corrected for the channels that are gone. What does nothing can so be cut away
without changing a logit, wherever it lies. Training has to mend the rest
(objectives/distill.py).

B batch, T tokens, t tokens of a batch, N query heads, K kv heads, G query heads
of a kv head, H head dim, D embed, F mlp, L layers, n norms (2 L + 1).
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import errors
from llama_jax.model import attention, decoder, linear, norm, rope
from llama_jax.model import config as config_lib

# A layer's leaves by their axes: Q is N * H, K is K * H.
_AXES = {
  "attention_norm/scale": "D",
  "attention/query/kernel": "DQ",
  "attention/key/kernel": "DK",
  "attention/value/kernel": "DK",
  "attention/out/kernel": "QD",
  "mlp_norm/scale": "D",
  "mlp/gate/kernel": "DF",
  "mlp/up/kernel": "DF",
  "mlp/down/kernel": "FD",
}


class Importances(NamedTuple):
  """Means over the tokens of calibration batches, float64.

  Attributes:
    layers_L: 1 - the cosine of a layer's input and output.
    channels_LF: norm of what an MLP channel adds to the residual stream.
    heads_LN: norm of what a query head adds to it.
    embed_nD: magnitude of each channel behind each norm, in their order: two
      of each layer, and the last.
    shares_nD: square of each channel before each norm, in units of what the
      norm divides squares by.
  """

  layers_L: np.ndarray
  channels_LF: np.ndarray
  heads_LN: np.ndarray
  embed_nD: np.ndarray
  shares_nD: np.ndarray


def measure(
  model: decoder.Decoder,
  params: dict[str, Any],
  batches: Iterable[Mapping[str, Any]],
) -> Importances:
  """What each part of a model does on some text.

  Args:
    model: says the configuration, the compute dtype and the attention kernel.
    params: stacked, as for training; on any mesh.
    batches: tokens, positions and segments, int32 [B, T] each; padding is not
      counted. Published cuts took about a thousand rows.
  """
  add_up = jax.jit(functools.partial(_sums, model))
  total, count = None, 0
  for batch in batches:
    rows = [batch[name] for name in ("tokens", "positions", "segments")]
    sums = jax.device_get(add_up(params, *rows))
    sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    count += int((np.asarray(batch["segments"]) > 0).sum())
  if not count:
    raise errors.UserError(
      "pruning measures a model on text, and there is none; give some."
    )
  return jax.tree.map(lambda a: a / count, total)


def _sums(model, params, ids_BT, positions_BT, segments_BT) -> Importances:
  """Importances of one batch, as sums over its tokens."""
  config = model.config
  dtype = "bfloat16" if model.dtype == "float8" else model.dtype
  block = decoder.Block(config, jnp.dtype(dtype), model.attention)
  tokens = attention.Tokens(
    positions_BT, segments_BT, *rope.table(config, positions_BT)
  )
  real_t = segments_BT.reshape(-1) > 0

  def over_tokens(values_tX):
    """Their sum over real tokens, [X]."""
    return jnp.sum(values_tX, axis=0, where=real_t[:, None])

  def flat(x):
    return x.astype(jnp.float32).reshape(-1, x.shape[-1])

  def shares(x_tD):
    squares_tD = x_tD * x_tD
    mean_t1 = jnp.mean(squares_tD, axis=-1, keepdims=True)
    return over_tokens(squares_tD / (mean_t1 + config.norm_eps))

  def unit(x_tD):
    squares_t1 = jnp.sum(x_tD * x_tD, axis=-1, keepdims=True)
    return x_tD / jnp.sqrt(jnp.maximum(squares_t1, jnp.finfo(x_tD.dtype).tiny))

  def layer(x_BTD, held):
    inputs, added = {}, {}

    def listen(call, args, kwargs, context):
      result = call(*args, **kwargs)
      if context.method_name != "__call__":
        return result
      if isinstance(context.module, linear.Linear):
        inputs[context.module.name] = flat(args[0])
      elif isinstance(context.module, attention.Attention):
        added["attention"] = flat(result[0])
      return result

    with nn.intercept_methods(listen):
      y_BTD, _ = block.apply({"params": held}, x_BTD, tokens)
    x_tD, y_tD = flat(x_BTD), flat(y_BTD)
    # 1 - cosine, without taking two near numbers from each other.
    turned_t1 = jnp.sum((unit(x_tD) - unit(y_tD)) ** 2, -1, keepdims=True) / 2

    down_FD = held["mlp"]["down"]["kernel"].astype(jnp.float32)
    leaving_F = jnp.linalg.norm(down_FD, axis=1)
    channels_F = over_tokens(jnp.abs(inputs["down"])) * leaving_F

    N, H = config.num_heads, config.head_dim
    out_tNH = inputs["out"].reshape(-1, N, H)
    kernel_NHD = held["attention"]["out"]["kernel"].reshape(N, H, -1)
    kernel_NHD = kernel_NHD.astype(jnp.float32)
    # |o W|^2 by the products of W's rows: [t, N, D] would be large.
    products_NHI = jnp.einsum("NHD,NID->NHI", kernel_NHD, kernel_NHD)
    squares_tN = jnp.einsum("tNH,NHI,tNI->tN", out_tNH, products_NHI, out_tNH)
    heads_N = over_tokens(jnp.sqrt(jnp.maximum(squares_tN, 0)))

    behind_2D = [over_tokens(jnp.abs(inputs[n])) for n in ("query", "gate")]
    before_2D = [shares(x_tD), shares(x_tD + added["attention"])]
    return y_BTD, Importances(
      over_tokens(turned_t1)[0],
      channels_F,
      heads_N,
      jnp.stack(behind_2D),
      jnp.stack(before_2D),
    )

  x_BTD = params["embed"]["embedding"][ids_BT].astype(dtype)
  x_BTD, found = jax.lax.scan(layer, x_BTD, params["layers"])
  scale_D = params["final_norm"]["scale"]
  last_tD = flat(norm.rms_norm(x_BTD, scale_D, config.norm_eps))

  def with_last(each_L2D, last_D):
    each_nD = each_L2D.reshape(-1, config.embed_dim)
    return jnp.concatenate([each_nD, last_D[None]])

  return found._replace(
    embed_nD=with_last(found.embed_nD, over_tokens(jnp.abs(last_tD))),
    shares_nD=with_last(found.shares_nD, shares(flat(x_BTD))),
  )


def check(config: config_lib.LlamaConfig, target: config_lib.LlamaConfig):
  """Raises ConfigError where target cannot be cut out of config."""
  for name in ("vocab_size", "head_dim", "rope_theta", "head"):
    have, want = getattr(config, name), getattr(target, name)
    if have != want:
      raise errors.ConfigError(
        f"model.{name}={want} cannot be had by pruning a model of"
        f" model.{name}={have}, which does not change it; use {have}."
      )
  for name in (
    "num_layers",
    "embed_dim",
    "mlp_dim",
    "num_kv_heads",
    "num_groups",
  ):
    have, want = getattr(config, name), getattr(target, name)
    if want > have:
      knob = f"model.{name}"
      if name == "num_groups":
        knob = "model.num_heads / model.num_kv_heads"
      raise errors.ConfigError(
        f"{knob}={want} is more than the {have} of the model to prune, and"
        f" pruning only takes away; use {have} or less."
      )


def _most(values, count: int) -> np.ndarray:
  """Where the largest `count` along the last axis lie, in their order."""
  order = np.argsort(-values, axis=-1, kind="stable")
  return np.sort(order[..., :count], axis=-1)


def prune(
  config: config_lib.LlamaConfig,
  params: dict[str, Any],
  importances: Importances,
  target: config_lib.LlamaConfig,
) -> dict[str, Any]:
  """Params of target, cut out of those of config.

  RoPE's scaling and norm_eps are target's, whatever config's are. A head that
  is to be tied is dropped, and the embedding takes its place untrained for it;
  one that is to be untied begins as the embedding.

  Args:
    config: of the model to prune.
    params: its, stacked; may be traced, so that jax.jit says where they go.
    importances: its, see measure.
    target: the shape to reach, such as one of sizes.SIZES.

  Raises:
    ConfigError: pruning cannot reach it (see check).
  """
  check(config, target)
  L, K, G, H = (
    target.num_layers,
    config.num_kv_heads,
    config.num_groups,
    config.head_dim,
  )
  layers = _most(importances.layers_L, L)
  heads_LKG = importances.heads_LN[layers].reshape(L, K, G)
  # In each group the best heads; then the groups whose best add the most.
  best = _most(heads_LKG, target.num_groups)
  kv_heads = _most(
    np.take_along_axis(heads_LKG, best, axis=-1).sum(-1), target.num_kv_heads
  )
  best = np.take_along_axis(best, kv_heads[..., None], axis=1)
  norms = np.append(2 * layers[:, None] + np.arange(2), 2 * config.num_layers)
  embed_nD = importances.embed_nD[norms]
  means_n1 = embed_nD.mean(-1, keepdims=True)
  embed_nD = embed_nD / np.maximum(means_n1, np.finfo(np.float64).tiny)
  embed = _most(embed_nD.sum(0), target.embed_dim)

  def whole(heads):
    """The columns of these heads."""
    return (heads.reshape(L, -1, 1) * H + np.arange(H)).reshape(L, -1)

  chosen = {
    "D": np.tile(embed, (L, 1)),
    "F": _most(importances.channels_LF[layers], target.mlp_dim),
    "Q": whole(kv_heads[..., None] * G + best),
    "K": whole(kv_heads),
  }

  def cut(path, leaf):
    leaf = jnp.take(leaf, layers, axis=0)
    axes = _AXES["/".join(entry.key for entry in path)]
    for axis, letter in enumerate(axes, start=1):
      shape = [L, *[1] * (leaf.ndim - 1)]
      shape[axis] = -1
      index = chosen[letter].reshape(shape)
      leaf = jnp.take_along_axis(leaf, index, axis=axis)
    return leaf

  # What the norms divide squares by, afterwards in units of before.
  shares_nD = importances.shares_nD[norms]
  left_n = shares_nD[:, embed].mean(-1) + 1 - shares_nD.mean(-1)
  scales_n = np.sqrt(left_n).astype(np.float32)

  def corrected(scale, by):
    if target.embed_dim == config.embed_dim:
      return scale
    return (scale * by).astype(scale.dtype)

  inner = jax.tree.map_with_path(cut, params["layers"])
  for place, name in enumerate(("attention_norm", "mlp_norm")):
    by_L1 = scales_n[place:-1:2, None]
    inner[name] = {"scale": corrected(inner[name]["scale"], by_L1)}
  last_D = jnp.take(params["final_norm"]["scale"], embed)
  table_VD = jnp.take(params["embed"]["embedding"], embed, axis=1)
  result = {
    "embed": {"embedding": table_VD},
    "layers": inner,
    "final_norm": {"scale": corrected(last_D, scales_n[-1])},
  }
  if config.head == "scalar":
    score_D1 = jnp.take(params["score"]["kernel"], embed, axis=0)
    result["score"] = {"kernel": score_D1}
  elif not target.tied_embeddings:
    head_DV = table_VD.T
    if not config.tied_embeddings:
      head_DV = jnp.take(params["head"]["kernel"], embed, axis=0)
    result["head"] = {"kernel": head_DV}
  return result
