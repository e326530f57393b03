"""Our side of the GPU decoding benchmark: a worker (see cpu_worker.py).

Needs jax, flax and numpy, and of this package model, kernels, decoding and
parallel. A spec is a row's, as gpu_decode_rows.py makes it; "tied" in it says
of the embeddings what the size does not. A variant is a dict:

  cache      of decode: "static" (loop.decode), "paged" (programs.draw, pages
             read in place where a kernel can) or "gather" (pages copied first)
  merged     query, key and value in one matrix, gate and up in another
  attention  of prefill a key of kernels.ATTENTION, of batching of
             kernels.paged.KERNELS, or "auto"
"""

import dataclasses
import functools
import importlib.metadata
import statistics
import time

import cpu_worker
import gpu_decode_paths as paths
import gpu_decode_work as work
import gpu_rates
import gpu_weights
import numpy as np


class Ours:
  """llama_jax's decoding on one device."""

  def hello(self):
    import jax

    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
      "library": "llama_jax",
      "versions": {p: importlib.metadata.version(p) for p in packages},
      "backend": jax.default_backend(),
      "device": device.device_kind,
      "memory": (device.memory_stats() or {}).get("bytes_limit"),
    }

  def describe(self, spec):
    """The model, and what its work is."""
    config = dataclasses.asdict(_config(spec))
    weights = gpu_weights.shapes(config).values()
    return {
      "config": config,
      "parameters": int(sum(np.prod(shape) for shape in weights)),
      "weight_bytes": work.weight_bytes(config),
      "token_bytes": work.token_bytes(config),
      "prefill_flops": work.prefill_flops(config, spec["cached"]),
      "tokens": work.tokens(config, spec),
    }

  def rate(self, kind, size, soak, repeats):
    """Of gpu_rates, kind "copy" or "matmul"."""
    return {"rate": getattr(gpu_rates, kind)(size, soak, repeats)}

  # Before any timing.

  def check_paged(self, heads, kv_heads, head_dim):
    """Each paged kernel in bfloat16 against attention in one piece, float32.

    Returns:
      "KERNEL, T tokens" -> norm of the error over the norm; or why that kernel
      cannot run here.
    """
    from llama_jax import errors, kernels
    from llama_jax.kernels import paged

    sizes = {
      "num_heads": heads,
      "num_kv_heads": kv_heads,
      "head_dim": head_dim,
      "page_size": paths.PAGE,
    }
    found = {}
    for kernel in paged.KERNELS:
      try:
        paged.resolve(kernel, kernels.platform(), dtype="bfloat16", **sizes)
      except errors.ConfigError as error:
        found[kernel] = str(error)
        continue
      for count in (1, 4):
        found[f"{kernel}, {count} tokens"] = _paged_error(
          kernel, count, **sizes
        )
    return {"errors": found}

  def logits(self, spec, tokens, file):
    """Float32 logits [T, V] of the weights of gpu_weights, and ids [1, T]."""
    config = _config(spec)
    ids_BT = work.ids(config.vocab_size, 1, tokens, 0)
    stacked = gpu_weights.stacked(dataclasses.asdict(config))
    logits_BTV = paths.plain_logits(config, stacked, ids_BT)
    np.savez(file, ids=ids_BT, logits=logits_BTV[0])
    return {}

  def greedy(self, spec, prompt, new, ways, file):
    """Greedy tokens of each way to decode, against one forward over them all.

    Args:
      ways: (dtype, cache, merged).

    Returns:
      their names, and for each how far a token it chose lies below the best at
      its place in the plain float32 forward, at most, of the logits' spread.
      How many of a way's tokens are different, at least. The file holds ids
      [ways, prompt + new].
    """
    import jax

    from llama_jax.model import decoder as decoder_lib
    from llama_jax.model import unrolled as unrolled_lib

    config = _config(spec)
    stacked = gpu_weights.stacked(dataclasses.asdict(config))
    params = unrolled_lib.unstack(stacked)
    words = work.ids(config.vocab_size, 1, prompt, 0)[0].tolist()
    rows = []
    for dtype, cache, merged in ways:
      cast = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), params)
      if merged:
        cast = unrolled_lib.merge(cast)
      decoder = decoder_lib.Decoder(config, dtype=dtype, scan=False)
      precision = "highest" if dtype == "float32" else "default"
      with jax.default_matmul_precision(precision):
        rows.append(words + paths.greedy(decoder, cast, words, new, cache))
    ids_BT = np.asarray(rows, np.int32)
    np.savez(file, ids=ids_BT, prompt=prompt)
    logits_BTV = paths.plain_logits(config, stacked, ids_BT)
    return {
      "ways": [
        f"{dtype} {cache}{' merged' if merged else ''}"
        for dtype, cache, merged in ways
      ],
      "short": work.short_of_best(logits_BTV, ids_BT, prompt),
      "different": min(len(set(row[prompt:])) for row in rows),
    }

  def kl(self, spec, tokens):
    """KL(bfloat16 || int8) of the next token over random ones, in nats."""
    import jax
    import jax.numpy as jnp

    from llama_jax.model import decoder as decoder_lib
    from llama_jax.model import quantize

    config = _config(spec)
    decoder = decoder_lib.Decoder(config, dtype="bfloat16", scan=False)
    params = paths.random_params(config, merged=False)
    ids = work.ids(config.vocab_size, 1, tokens, 0)
    positions = np.arange(tokens, dtype=np.int32)[None]

    @jax.jit
    def logprobs(params):
      logits, _ = decoder.apply(
        {"params": params}, ids, positions, jnp.ones_like(ids)
      )
      return jax.nn.log_softmax(logits[0])

    ours, other = (
      logprobs(one) for one in (params, quantize.quantize(params, "int8"))
    )
    each = np.asarray(jnp.sum(jnp.exp(ours) * (ours - other), axis=-1))
    return {"mean": float(each.mean()), "max": float(each.max())}

  # What is timed: {"fits": False} where memory does not suffice.

  def decode(self, spec, variant, new, per_call, warmups, repeats):
    """Seconds of a token of all rows, of `new` with `cached` before them."""

    def measure():
      config = _config(spec)
      params = paths.random_params(config, variant["merged"], spec["dtype"])
      way = paths.CACHES[variant["cache"]](config, params, spec, new)
      seconds = []
      for _ in range(1 + warmups + repeats):
        way.prepare()
        began = time.perf_counter()
        # All calls are on their way while the first one's tokens are fetched.
        for tokens_BC in way.decode(per_call):
          np.asarray(tokens_BC)
        seconds.append((time.perf_counter() - began) / new)
      return _told(seconds[1 + warmups :]) | {
        "compile": seconds[0] * new,
        "kernel": way.kernel,
      }

    return _measured(measure)

  def prefill(self, spec, variant, warmups, repeats):
    """Seconds from `cached` tokens of a prompt to the next one."""
    import jax
    import jax.numpy as jnp

    from llama_jax.decoding import loop, sampling
    from llama_jax.model import decoder as decoder_lib

    def measure():
      config = _config(spec)
      params = paths.random_params(config, variant["merged"])
      B, T = spec["rows"], spec["cached"]
      run = functools.partial(
        loop.prefill,
        params,
        jnp.asarray(work.ids(config.vocab_size, B, T, 0)),
        jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)),
        jnp.ones((B, T), jnp.int32),
        decoder=decoder_lib.Decoder(
          config, dtype="bfloat16", attention=variant["attention"], scan=False
        ),
        slots=loop.bucket(T + 1, loop.CACHE_BUCKET),
      )
      knobs, features = sampling.knobs([sampling.SamplingConfig()] * B)
      knobs = jax.tree.map(jnp.asarray, knobs)
      seconds = []
      for _ in range(1 + warmups + repeats):
        began = time.perf_counter()
        made = run(knobs=knobs, seen=None, features=features)
        made.token_B.block_until_ready()
        seconds.append(time.perf_counter() - began)
      return _told(seconds[1 + warmups :]) | {"compile": seconds[0]}

    return _measured(measure)

  def batching(self, spec, variant, count):
    """Seconds until the first `count` requests are answered by the engine."""
    from llama_jax.decoding import engine as engine_lib
    from llama_jax.decoding import request, sampling
    from llama_jax.model import decoder as decoder_lib

    def measure():
      config = _config(spec)
      params = paths.random_params(config, variant["merged"])
      decoder = decoder_lib.Decoder(config, dtype="bfloat16", scan=False)
      longest = spec["prompts"][1] + spec["answers"][1] + paths.PAGE
      settings = engine_lib.EngineConfig(
        cache_tokens=count * longest,
        page_size=paths.PAGE,
        max_batch=count,
        chunk=paths.CHUNK,
        tokens_per_call=paths.TOKENS_PER_CALL,
        attention=variant["attention"],
      )

      def once(seed):
        # A new one: prompts that it read before it would find in its pages.
        engine = engine_lib.Engine(decoder, params, settings)
        asked = [
          request.Request(prompt, new, sampling.SamplingConfig())
          for prompt, new in work.requests(
            config.vocab_size, count, spec["prompts"], spec["answers"], seed
          )
        ]
        began = time.perf_counter()
        answers = engine.run(asked)
        seconds = time.perf_counter() - began
        told = [len(one.tokens) for (one,) in answers]
        if told != [one.max_new_tokens for one in asked]:
          raise RuntimeError("the engine left an answer short")
        return seconds, sum(told)

      # The same shapes, so that all is compiled.
      compiled, _ = once(1)
      seconds, tokens = once(0)
      return _told([seconds]) | {"compile": compiled, "tokens": tokens}

    return _measured(measure)


def _config(spec):
  from llama_jax.model import sizes

  config = sizes.get(spec["size"])
  if spec["num_layers"]:
    config = dataclasses.replace(config, num_layers=spec["num_layers"])
  if "tied" in spec:
    config = dataclasses.replace(config, tied_embeddings=spec["tied"])
  return config


def _told(seconds):
  return {"steps": seconds, "seconds": statistics.median(seconds)}


def _measured(measure):
  """What a call measured, and the memory it took."""
  import jax

  from llama_jax.parallel import hosts

  try:
    told = measure()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"fits": False}
  return {"fits": True, "peak": hosts.peak_memory()} | told


def _paged_error(kernel, count, num_heads, num_kv_heads, head_dim, page_size):
  """Of `count` new tokens a row over pages in any order, rows of any length."""
  import jax
  import jax.numpy as jnp

  from llama_jax.kernels import paged, reference

  rng = np.random.default_rng(0)
  P = page_size
  lengths_B = np.array(
    [count, P - 1, P, P + count, 5 * P + 3, 16 * P], np.int32
  )
  B, X = len(lengths_B), 16
  table_BX = 1 + rng.permutation(B * X).reshape(B, X).astype(np.int32)
  pos_BS = np.tile(np.arange(X * P, dtype=np.int32), (B, 1))
  real_BS = pos_BS < lengths_B[:, None]
  page_BS = np.where(real_BS, table_BX.repeat(P, axis=1), 0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

  q_BTNH = normal(B, count, num_heads, head_dim)
  k_BSKH, v_BSKH = (
    normal(*pos_BS.shape, num_kv_heads, head_dim) for _ in range(2)
  )
  q_pos_BT = lengths_B[:, None] - count + np.arange(count, dtype=np.int32)
  q_seg_BT = np.ones_like(q_pos_BT)

  @jax.jit
  def ours(q_BTNH, k_BSKH, v_BSKH):
    pool = paged.empty(
      kernel, 1 + B * X, P, num_kv_heads, head_dim, jnp.bfloat16
    )
    pool = paged.write(pool, k_BSKH, v_BSKH, page_BS, pos_BS % P)
    return paged.attend(
      q_BTNH,
      pool,
      table_BX,
      q_pos_BT=q_pos_BT,
      q_seg_BT=q_seg_BT,
      lengths_B=lengths_B,
    )

  with jax.default_matmul_precision("highest"):
    truth = jax.jit(reference.attend)(
      *(a.astype(jnp.float32) for a in (q_BTNH, k_BSKH, v_BSKH)),
      q_pos_BT=q_pos_BT,
      k_pos_BS=pos_BS,
      q_seg_BT=q_seg_BT,
      k_seg_BS=real_BS.astype(np.int32),
    )
  truth = np.asarray(truth, np.float64)
  off = np.asarray(ours(q_BTNH, k_BSKH, v_BSKH), np.float64) - truth
  return float(np.linalg.norm(off) / np.linalg.norm(truth))


if __name__ == "__main__":
  cpu_worker.serve(Ours())
