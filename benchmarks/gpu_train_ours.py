"""Our side of the GPU training benchmark: a worker (see cpu_worker.py).

Needs jax, flax, optax and numpy, and of this package model, kernels,
objectives, training and parallel. A spec, of every request, is a dict: size,
num_layers (0 for the size's own), sequence, rows (of a step), dtype,
mean_document (0 for one document a row). A policy is a dict: rematerialise,
microbatch (rows), loss_chunk (tokens, 0 for the default), attention.
"""

import dataclasses
import functools
import gc
import importlib.metadata
import statistics
import time

import cpu_worker
import gpu_rates
import gpu_train_work as work
import gpu_weights
import numpy as np


class Ours:
  """llama_jax's update as llama_jax.train compiles it, without its files."""

  def hello(self):
    import jax

    from llama_jax.parallel import mesh
    from llama_jax.training import flops

    device = jax.devices()[0]
    one = mesh.make(mesh.ParallelConfig(data=1, fsdp=1, tensor=1), [device])
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
      "library": "llama_jax",
      "versions": {p: importlib.metadata.version(p) for p in packages},
      "backend": jax.default_backend(),
      "device": device.device_kind,
      "memory": (device.memory_stats() or {}).get("bytes_limit"),
      "peak_flops": flops.peak(one),
    }

  def describe(self, spec):
    """The model, and the FLOPs of a token on such rows."""
    from llama_jax.training import flops

    config = _config(spec)
    length = flops.attention_length(_rows(spec, config, 0)["segments"])
    weights = gpu_weights.shapes(dataclasses.asdict(config)).values()
    return {
      "config": dataclasses.asdict(config),
      "parameters": int(sum(np.prod(shape) for shape in weights)),
      "flops_per_token": flops.per_token(config, length),
    }

  def rate(self, size, soak, repeats):
    """bfloat16 FLOP/s; see gpu_rates.matmul."""
    return {"flops": gpu_rates.matmul(size, soak, repeats)}

  def check_attention(self, length, heads, kv_heads, head_dim):
    """Each kernel in bfloat16 against the reference in float32.

    Returns:
      "KERNEL, rows" -> norm of the error over the norm, of the output and of
      each gradient; or why that kernel cannot run here.
    """
    import jax
    import jax.numpy as jnp

    from llama_jax import errors, kernels

    rng = np.random.default_rng(1)
    parts = [
      jnp.asarray(rng.standard_normal((2, length, n, head_dim)), jnp.bfloat16)
      for n in (heads, kv_heads, kv_heads, heads)
    ]

    def run(attend, batch, dtype):
      q, k, v, d_out = (part.astype(dtype) for part in parts)
      positions, segments = batch["positions"], batch["segments"]
      # What a kernel gives for padding is its own affair.
      real = jnp.asarray(segments != 0)[..., None, None]

      def function(q, k, v):
        out = attend(
          q,
          k,
          v,
          q_pos_BT=positions,
          k_pos_BS=positions,
          q_seg_BT=segments,
          k_seg_BS=segments,
        )
        return jnp.where(real, out, 0)

      @jax.jit
      def both(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

      return [np.asarray(a, np.float64) for a in both(q, k, v, d_out)]

    found = {}
    for rows, mean_document in (("dense", 0), ("packed", length // 5)):
      batch = work.rows(8, 2, length, mean_document, 0)
      batch["segments"][1, -length // 8 :] = 0  # padding
      with jax.default_matmul_precision("highest"):
        truth = run(kernels.ATTENTION["reference"], batch, jnp.float32)
      for name, attend in kernels.ATTENTION.items():
        try:
          kernels.resolve(name, "bfloat16", head_dim)
        except errors.ConfigError as error:
          found[f"{name}, {rows}"] = str(error)
          continue
        found[f"{name}, {rows}"] = [
          float(np.linalg.norm(a - b) / np.linalg.norm(b))
          for a, b in zip(run(attend, batch, jnp.bfloat16), truth, strict=True)
        ]
    return {"errors": found}

  def logits(self, spec, file):
    """Float32 logits of the weights of gpu_weights, for row 0."""
    import jax

    from llama_jax.model import decoder as decoder_lib

    config = _config(spec)
    decoder = decoder_lib.Decoder(
      config, attention="chunked", rematerialise="none"
    )
    batch = _rows(spec, config, 0)
    with jax.default_matmul_precision("highest"):
      run = jax.jit(lambda *args: decoder.apply(*args)[0])
      logits = run(
        {"params": gpu_weights.stacked(dataclasses.asdict(config))},
        *(batch[n][:1] for n in ("tokens", "positions", "segments")),
      )
    np.save(file, np.asarray(logits))
    return {}

  def first(self, spec, attention):
    """Loss and gradient norm of one update of the same weights."""
    import jax

    config = _config(spec)
    policy = {
      "rematerialise": "none",
      "microbatch": spec["rows"],
      "loss_chunk": 0,
      "attention": attention,
    }
    precision = "highest" if spec["dtype"] == "float32" else "default"
    with jax.default_matmul_precision(precision):
      weights = gpu_weights.stacked(dataclasses.asdict(config))
      training = Training(spec, policy, weights)
      training.compile()
      metrics = training.step(0)
    return {n: float(metrics[n]) for n in ("loss", "grad_norm")}

  def train(self, spec, policy, warmups, steps):
    """Times updates; or {"fits": False} where memory does not suffice."""
    import jax

    from llama_jax.parallel import hosts

    training = None
    try:
      training = Training(spec, policy)
      compiled = training.compile()
      seconds, losses = training.run(warmups, steps)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return {"fits": False}
    finally:
      del training
      gc.collect()
    return {
      "fits": True,
      "compile": compiled,
      "steps": seconds,
      "seconds": statistics.median(seconds),
      "loss": losses,
      "peak": hosts.peak_memory(),
    }

  def converge(self, spec, policy, steps):
    """Losses of updates on real text, at a rate that learns."""
    training = Training(spec, policy, learning_rate=3e-4)
    size = spec["rows"] * (spec["sequence"] + 1)
    ids = work.text(steps * size).reshape(steps, spec["rows"], -1)
    training.compile()
    ready = training.rows[0]
    losses = []
    for step in range(steps):
      batch = ready | {"tokens": ids[step, :, :-1], "targets": ids[step, :, 1:]}
      training.rows = [batch]
      losses.append(training.step(0)["loss"])
    return {"loss": [float(loss) for loss in losses]}

  def first_step(self, spec, policy, began):
    """Seconds since the process was started until its first update is done."""
    training = Training(spec, policy)
    compiled = training.compile()
    training.step(0)["loss"].block_until_ready()
    return {"seconds": time.time() - began, "compile": compiled}


class Training:
  """A state and the update of llama_jax.train, on one device.

  Attributes:
    rows: batches, each array [rows, sequence], that are taken in turns.
  """

  def __init__(self, spec, policy, params=None, learning_rate=None):
    import jax
    import jax.numpy as jnp

    from llama_jax.kernels import chunks, platform
    from llama_jax.model import decoder as decoder_lib
    from llama_jax.objectives import next_token
    from llama_jax.parallel import mesh
    from llama_jax.training import optimizer as optimizer_lib
    from llama_jax.training import state as state_lib
    from llama_jax.training import step as step_lib

    config = _config(spec)
    recipe = optimizer_lib.OptimizerConfig(
      schedule="constant",
      warmup_steps=0,
      final_lr_fraction=1.0,
      decay_fraction=0.0,
      moments_dtype="float32",
      **work.OPTIMIZER,
    )
    if policy["loss_chunk"]:
      chunks.TOKENS[platform()] = policy["loss_chunk"]
    self._microbatch = policy["microbatch"]
    self._rate = np.float32(learning_rate or recipe.peak_lr)
    self._mesh = mesh.make(
      mesh.ParallelConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1]
    )
    self.rows = [_rows(spec, config, seed) for seed in range(2)]
    decoder = decoder_lib.Decoder(
      config,
      dtype=spec["dtype"],
      attention=policy["attention"],
      rematerialise=policy["rematerialise"],
    )

    def loss_sum(params, *batch):
      return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")

    optimizer = optimizer_lib.make(recipe)
    update = step_lib.make(
      next_token.make(loss_sum, 1), optimizer, spike_factor=0
    )
    with jax.set_mesh(self._mesh):
      _, placed = state_lib.shardings(
        functools.partial(decoder_lib.init, decoder), optimizer, self._mesh
      )

      def create(params):
        import flax.linen as nn

        if params is None:
          params = nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return state_lib.create(params, optimizer)

      self._state = jax.jit(create, out_shardings=placed)(params)
    self._update = jax.jit(
      update, out_shardings=(placed, None), donate_argnums=0
    )

  def _batch(self, index):
    from llama_jax.parallel import hosts

    batch = self.rows[index % len(self.rows)]
    cut = {
      name: rows.reshape(-1, self._microbatch, *rows.shape[1:])
      for name, rows in batch.items()
    }
    return hosts.put_batch(cut, self._mesh, axis=1)

  def compile(self):
    """Seconds it takes to have the update as a program."""
    import jax

    began = time.perf_counter()
    with jax.set_mesh(self._mesh):
      lowered = self._update.lower(self._state, self._batch(0), self._rate)
      self._update = lowered.compile()
    return time.perf_counter() - began

  def step(self, index):
    """One update's metrics, which may not be there yet."""
    import jax

    with jax.set_mesh(self._mesh):
      self._state, metrics = self._update(
        self._state, self._batch(index), self._rate
      )
    return metrics

  def run(self, warmups, steps):
    """(seconds of each update, losses): the next one is always on its way."""
    stamps, losses = [], []
    waiting = self.step(0)
    for index in range(1, warmups + steps + 1):
      following = self.step(index)
      losses.append(float(waiting["loss"]))  # waits until it is done
      stamps.append(time.perf_counter())
      waiting = following
    waiting["loss"].block_until_ready()
    stamps.append(time.perf_counter())
    return np.diff(stamps)[warmups:].tolist(), losses


def _config(spec):
  from llama_jax.model import sizes

  config = sizes.get(spec["size"])
  if spec["num_layers"]:
    config = dataclasses.replace(config, num_layers=spec["num_layers"])
  return config


def _rows(spec, config, seed):
  return work.rows(
    config.vocab_size,
    spec["rows"],
    spec["sequence"],
    spec["mean_document"],
    seed,
  )


if __name__ == "__main__":
  cpu_worker.serve(Ours())
