"""The ways in which our side decodes, for the GPU decoding benchmark.

Where time is taken, caches are filled with random values: what attention reads
does not change how long it takes, and no prompt has to be read first.
"""

import functools

import numpy as np

# Of the engine, and of pages that are read without it.
PAGE, CHUNK, TOKENS_PER_CALL = 64, 2048, 16


def random_params(config, merged: bool, dtype: str = "bfloat16"):
  """Unrolled params made on the device, matrix by matrix.

  dtype: "bfloat16", or "int8" for matrices in 8 bits.
  """
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from llama_jax.model import decoder as decoder_lib
  from llama_jax.model import quantize
  from llama_jax.model import unrolled as unrolled_lib

  @functools.partial(jax.jit, static_argnames="shape")
  def matrix(key, shape):
    return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

  decoder = decoder_lib.Decoder(config, scan=False)
  shapes = jax.eval_shape(
    lambda: nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
  )
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
  params = jax.tree.unflatten(
    tree,
    [
      matrix(key, leaf.shape)
      if len(leaf.shape) == 2
      else jnp.ones(leaf.shape, jnp.bfloat16)
      for key, leaf in zip(keys, leaves, strict=True)
    ],
  )
  if merged:
    params = unrolled_lib.merge(params)
  return quantize.quantize(params, dtype) if dtype == "int8" else params


def plain_logits(config, stacked, ids_BT) -> np.ndarray:
  """Float32 logits [B, T, V] of stacked params, in one forward, no cache."""
  import jax

  from llama_jax.model import decoder as decoder_lib

  decoder = decoder_lib.Decoder(
    config, attention="chunked", rematerialise="none"
  )
  positions_BT = np.broadcast_to(
    np.arange(ids_BT.shape[1], dtype=np.int32), ids_BT.shape
  )
  with jax.default_matmul_precision("highest"):
    run = jax.jit(lambda *args: decoder.apply(*args)[0])
    logits_BTV = run(
      {"params": stacked}, ids_BT, positions_BT, np.ones_like(ids_BT)
    )
  return np.asarray(logits_BTV)


def greedy(decoder, params, prompt, new: int, cache: str) -> list[int]:
  """Tokens after a prompt, from a static cache or by the engine."""
  from llama_jax.decoding import engine as engine_lib
  from llama_jax.decoding import loop, request, sampling

  plain = sampling.SamplingConfig()
  if cache == "static":
    return loop.generate(
      decoder,
      params,
      [prompt],
      max_new_tokens=new,
      sampling_config=plain,
      stop_ids=(),
    )[0]
  settings = engine_lib.EngineConfig(
    cache_tokens=len(prompt) + new + PAGE, page_size=PAGE, max_batch=1
  )
  engine = engine_lib.Engine(decoder, params, settings)
  ((answer,),) = engine.run([request.Request(prompt, new, plain)])
  return answer.tokens


def _noise(tree):
  """Random values in all floating arrays: zeros would draw less power."""
  import jax
  import jax.numpy as jnp

  def one(key, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return jax.random.normal(key, leaf.shape, leaf.dtype)

  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(1, impl="rbg"), len(leaves))
  return jax.tree.unflatten(structure, map(one, keys, leaves))


class _Way:
  """Tokens for all rows, `new` of them around position `cached`.

  Attributes:
    kernel: what reads the cache.
  """

  kernel = "cached"

  def __init__(self, config, params, spec, new):
    import jax
    import jax.numpy as jnp

    from llama_jax.decoding import sampling
    from llama_jax.model import decoder as decoder_lib

    self._config, self._params = config, params
    self._decoder = decoder_lib.Decoder(config, dtype="bfloat16", scan=False)
    self._rows, self._new = spec["rows"], new
    # So that there are `cached` in the mean.
    self._start = spec["cached"] - new // 2
    knobs, self._features = sampling.knobs(
      [sampling.SamplingConfig()] * self._rows
    )
    self._knobs = jax.tree.map(jnp.asarray, knobs)
    self._fill()

  def _fill(self):
    """The cache."""

  def prepare(self):
    """Takes the cache back to where it was."""

  def decode(self, per_call):
    """Each call's tokens [B, C], which may not be there yet."""
    raise NotImplementedError


class Static(_Way):
  """loop.decode over a static cache."""

  def _fill(self):
    import jax.numpy as jnp

    from llama_jax.decoding import loop
    from llama_jax.model import cache as cache_lib

    slots = loop.bucket(self._start + self._new, loop.PROMPT_BUCKET)
    cache = cache_lib.empty(self._config, self._rows, slots, jnp.bfloat16)
    self._cache = _noise(cache).replace(before=None)

  def prepare(self):
    import jax.numpy as jnp

    from llama_jax.decoding import loop

    B, start = self._rows, self._start
    order_BS = jnp.tile(jnp.arange(self._cache.slots), (B, 1))
    self._generation = loop.Generation(
      cache=self._cache.replace(
        positions_BS=order_BS,
        segments_BS=(order_BS < start).astype(jnp.int32),
        used=jnp.int32(start),
      ),
      token_B=jnp.zeros((B,), jnp.int32),
      position_B=jnp.full((B,), start, jnp.int32),
      done_B=jnp.zeros((B,), bool),
      drawn=jnp.int32(1),
      seen=None,
    )

  def decode(self, per_call):
    from llama_jax.decoding import loop

    found = []
    for _ in range(self._new // per_call):
      tokens_BC, self._generation = loop.decode(
        self._params,
        self._generation,
        self._knobs,
        decoder=self._decoder,
        count=per_call,
        features=self._features,
      )
      found.append(tokens_BC)
    self._cache = self._generation.cache
    return found


class Paged(_Way):
  """programs.draw over pages, in place where a kernel can."""

  attention = "auto"

  def _fill(self):
    from llama_jax import kernels
    from llama_jax.kernels import paged

    config = self._config
    sizes = (config.num_kv_heads, config.head_dim)
    self.kernel = paged.resolve(
      self.attention,
      kernels.platform(),
      dtype="bfloat16",
      num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      page_size=PAGE,
    )
    width = -(-(self._start + self._new) // PAGE)
    count = self._rows * width
    # As they lie after a while: in any order.
    order = 1 + np.random.default_rng(0).permutation(count).astype(np.int32)
    self._table_BX = order.reshape(self._rows, width)
    self._pools = tuple(
      _noise(paged.empty(self.kernel, 1 + count, PAGE, *sizes, "bfloat16"))
      for _ in range(config.num_layers)
    )

  def _copy(self):
    """What decoding goes on with; None: the pages themselves."""

  def decode(self, per_call):
    from llama_jax.decoding import programs

    B = self._rows
    found, cache = [], self._copy()
    token_B = np.zeros(B, np.int32)
    for begin in range(self._start, self._start + self._new, per_call):
      places_C = np.arange(begin, begin + per_call, dtype=np.int32)
      places_BC = np.tile(places_C, (B, 1))
      rows = programs.Rows(
        token_B=token_B,
        length_B=places_BC[:, 0],
        drawn_B=places_BC[:, 0],
        page_BC=self._table_BX[:, places_C // PAGE],
        offset_BC=places_BC % PAGE,
        table_BX=self._table_BX if cache is None else self._table_BX[:, :0],
      )
      tokens_BC, _, self._pools, cache = programs.draw(
        self._params,
        self._pools,
        cache,
        rows,
        self._knobs,
        None,
        None,
        decoder=self._decoder,
        features=self._features,
        top=None,
      )
      token_B = tokens_BC[:, -1]
      found.append(tokens_BC)
    return found


class Gather(Paged):
  """The same over a copy of the pages, whose making counts."""

  attention = "gather"

  def _copy(self):
    from llama_jax.decoding import programs

    lengths_B = np.full(self._rows, self._start, np.int32)
    return programs.gather(
      self._pools, self._table_BX, lengths_B, room=self._new
    )


CACHES = {"static": Static, "paged": Paged, "gather": Gather}
