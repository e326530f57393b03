"""Our side of the CPU benchmark: a worker (see cpu_worker.py)."""

import dataclasses
import functools
import os
import pathlib
import time

import cpu_worker


class Ours:
  """llama_jax through the parts that its verbs are made of."""

  def __init__(self):
    self._llamas = {}
    self._compile_seconds = 0.0

  def hello(self):
    import importlib.metadata

    from llama_jax import llama  # noqa: F401  (what loading needs)

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
      "library": "llama_jax",
      "threads": cpu_worker.cores(),
      "versions": {p: importlib.metadata.version(p) for p in packages},
    }

  def load(self, weights):
    """gguf:FILE, hf:DIR, orbax:DIR, or random:SIZE for a dry run."""
    from llama_jax import llama as llama_lib

    scheme, _, name = weights.partition(":")
    if scheme == "random":
      llama = _random(name)
    else:
      llama = llama_lib.load(weights)
    self._llamas = {
      dtype: dataclasses.replace(llama, dtype=dtype)
      for dtype in ("float32", "bfloat16")
    }
    return {"config": dataclasses.asdict(llama.config)}

  def text(self, count):
    """Ids of real text: this Python's own argparse module."""
    source = (pathlib.Path(os.__file__).parent / "argparse.py").read_text()
    return self._ids(source, count, seed=0)

  def _ids(self, text, count, seed):
    """As many ids of a text; of a model without a tokenizer, random ones."""
    llama = self._llamas["float32"]
    if llama.tokenizer is None:
      import numpy as np

      rng = np.random.default_rng(seed)
      return {"ids": rng.integers(0, llama.config.vocab_size, count).tolist()}
    ids = llama.tokenizer.encode(text)
    return {"ids": (ids * (count // len(ids) + 1))[:count]}

  def export(self, folder):
    from llama_jax.checkpoint import hugging_face

    llama = self._llamas["float32"]
    hugging_face.write(folder, llama.config, llama.params, None)
    return {}

  def rates(self):
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)
    found = {}
    for dtype in ("float32", "bfloat16"):
      for m, k, n in cpu_worker.GEMMS:
        keys = jax.random.split(jax.random.key(0))
        a = jax.random.normal(keys[0], (m, k), dtype)
        b = jax.random.normal(keys[1], (k, n), dtype)
        run = functools.partial(multiply, a, b)
        seconds = cpu_worker.seconds_of(
          lambda run=run: run().block_until_ready()
        )
        found[f"gemm {dtype} {m}x{k}x{n}, GFLOP/s"] = (
          2 * m * k * n / seconds / 1e9
        )
    # Donated, so that no fresh pages are touched.
    held = [jnp.ones(cpu_worker.COPY_BYTES // 4, jnp.float32)]
    scale = jax.jit(lambda x: x * 1.5, donate_argnums=0)

    def copy():
      held[0] = scale(held[0]).block_until_ready()

    seconds = cpu_worker.seconds_of(copy)
    found["copy, GB/s"] = 2 * cpu_worker.COPY_BYTES / seconds / 1e9
    return found

  def logits(self, ids, file):
    import numpy as np

    np.save(file, np.asarray(self._llamas["float32"].logits(ids)))
    return {}

  def warm(self, ids, new, dtype):
    self.decode(ids, new, dtype)
    return {"choice": "llama_jax.decoding.loop.stream"}

  def prefill(self, ids, dtype):
    # One token is what a prefill yields.
    return {"seconds": self.decode(ids, 1, dtype)["first"]}

  def decode(self, ids, new, dtype):
    from llama_jax.decoding import loop, sampling

    decoder, params = self._llamas[dtype].unrolled
    rows = [[] for _ in ids]
    stamps = [time.perf_counter()]
    for tokens in loop.stream(
      decoder,
      params,
      ids,
      max_new_tokens=new,
      sampling_config=sampling.SamplingConfig(temperature=0.0),
      stop_ids=(),
    ):
      stamps.append(time.perf_counter())
      for row, more in zip(rows, tokens, strict=True):
        row += more
    return {
      "tokens": rows,
      "first": stamps[1] - stamps[0],
      "rest": stamps[-1] - stamps[1],
    }

  def start_training(self, optimizer):
    # Faster than "full", for more memory (memory.py).
    self._start_training(optimizer, "dots")
    return {}

  def _start_training(self, optimizer, rematerialise):
    llama = self._llamas.pop("float32")
    self._llamas = {}
    self._training = Training(
      llama.config, llama.params, optimizer, rematerialise
    )

  def train_step(self, ids, dtype):
    began = time.perf_counter()
    loss, norm = self._training.step(ids, dtype)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": loss, "grad_norm": norm}

  def speak(self, weights, ids, new, dtype, began, cache):
    imported = self._import(cache)
    self.load(weights)
    # As generate holds them, once.
    self._llamas = {dtype: self._llamas[dtype]}
    self._llamas[dtype].only_decode()
    loaded = time.time()
    before = self._compile_seconds
    first = self.decode(ids, new, dtype)
    decoded = time.time()
    took = first["first"] + first["rest"]
    first_token = decoded - first["rest"]
    compiled = self._compile_seconds - before
    again = self.decode(ids, new, dtype)
    return {
      "import": imported,
      "load": loaded - began - imported,
      "first_token": first_token - began,
      "decoded": decoded - began,
      "compile": compiled,
      "set_up": took - again["first"] - again["rest"],
      "peak": cpu_worker.peak_bytes(),
    }

  def learn(self, weights, ids, steps, optimizer, dtype, began, cache):
    self._import(cache)
    self.load(weights)
    self._start_training(optimizer, "full")
    before = self._compile_seconds
    compiling = time.perf_counter()
    self._training.compile(ids, dtype)
    set_up = time.perf_counter() - compiling
    compiled = self._compile_seconds - before
    loss, norm = self._training.step(ids, dtype)
    first_step = time.time() - began
    for _ in range(steps - 1):
      self._training.step(ids, dtype)
    return {
      "first_step": first_step,
      "loss": loss,
      "grad_norm": norm,
      "compile": compiled,
      "set_up": set_up,
      "peak": cpu_worker.peak_bytes(),
    }

  def _import(self, cache):
    """Seconds of the imports that loading and decoding need."""
    began = time.perf_counter()
    from llama_jax import llama  # noqa: F401

    seconds = time.perf_counter() - began
    import jax

    from llama_jax import shell

    # Never the user's own: a cold start must be cold.
    os.environ["LLAMA_JAX_CACHE"] = cache
    shell.set_up_compiling()

    def note(event, duration, **rest):
      del rest
      if event == "/jax/core/compile/backend_compile_duration":
        self._compile_seconds += duration

    jax.monitoring.register_event_duration_secs_listener(note)
    return seconds


class Training:
  """The update of llama_jax.train, without its files."""

  def __init__(self, config, params, settings, rematerialise):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llama_jax.model import decoder as decoder_lib
    from llama_jax.parallel import mesh
    from llama_jax.training import optimizer as optimizer_lib
    from llama_jax.training import state as state_lib

    # A constant rate, as the peer's plain loop has.
    recipe = optimizer_lib.OptimizerConfig(
      schedule="constant",
      warmup_steps=0,
      final_lr_fraction=1.0,
      decay_fraction=0.0,
      moments_dtype="float32",
      **settings,
    )
    self._config, self._rematerialise = config, rematerialise
    self._optimizer = optimizer_lib.make(recipe)
    self._rate = np.float32(recipe.peak_lr)
    self._devices = mesh.make(
      mesh.ParallelConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1]
    )
    self._updates = {}
    with jax.set_mesh(self._devices):
      decoder = decoder_lib.Decoder(config)
      _, self._placed = state_lib.shardings(
        functools.partial(decoder_lib.init, decoder),
        self._optimizer,
        self._devices,
      )

      def create(params):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return state_lib.create(params, self._optimizer)

      self._state = jax.jit(
        create, out_shardings=self._placed, donate_argnums=0
      )(params)

  def _update(self, dtype):
    import jax

    from llama_jax.model import decoder as decoder_lib
    from llama_jax.objectives import next_token
    from llama_jax.training import step as step_lib

    if dtype not in self._updates:
      decoder = decoder_lib.Decoder(
        self._config, dtype=dtype, rematerialise=self._rematerialise
      )

      def loss_sum(params, *batch):
        return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")

      self._updates[dtype] = jax.jit(
        step_lib.make(
          next_token.make(loss_sum, 1), self._optimizer, spike_factor=0
        ),
        out_shardings=(self._placed, None),
        donate_argnums=0,
      )
    return self._updates[dtype]

  def _batch(self, ids):
    """Dense rows, all but the last token scored, as one microbatch."""
    import numpy as np

    from llama_jax.parallel import hosts

    tokens = np.asarray(ids, np.int32)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    batch = {
      "tokens": tokens,
      "targets": np.roll(tokens, -1, axis=1),
      "positions": np.tile(
        np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)
      ),
      "segments": np.ones_like(tokens),
      "loss_mask": mask,
      "sources": np.zeros(len(tokens), np.int32),
    }
    batch = {name: rows[None] for name, rows in batch.items()}
    return hosts.put_batch(batch, self._devices, axis=1)

  def compile(self, ids, dtype):
    """Leaves the compiled update for these shapes in place of the jitted."""
    import jax

    with jax.set_mesh(self._devices):
      lowered = self._update(dtype).lower(
        self._state, self._batch(ids), self._rate
      )
      self._updates[dtype] = lowered.compile()

  def step(self, ids, dtype):
    """(loss, gradient norm) of one update, when it is done."""
    import jax

    with jax.set_mesh(self._devices):
      self._state, metrics = self._update(dtype)(
        self._state, self._batch(ids), self._rate
      )
      jax.block_until_ready(self._state)
    return metrics["loss"].item(), metrics["grad_norm"].item()


def _random(size):
  import flax.linen as nn
  import jax

  from llama_jax import llama as llama_lib
  from llama_jax.model import decoder as decoder_lib
  from llama_jax.model import sizes

  config = sizes.get(size)
  decoder = decoder_lib.Decoder(config)
  params = nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
  return llama_lib.Llama(config, params, None)


if __name__ == "__main__":
  cpu_worker.serve(Ours())
