"""A second peer of the GPU training benchmark: jax-linear-attention's trainer.

A worker (cpu_worker.py) in an environment with jax-linear-attention 0.1.0,
which asks for Python 3.12 and jax 0.11.2. Its preset transformer-1b has Llama
3.2 1B's shapes; the norms of queries and keys that it adds are left out, and
what its own documentation advises for speed without recomputation is on. The
TOML files behind its published figures are not in the wheel.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import statistics
import sys
import tempfile

import cpu_worker

# Name of a variant -> what it sets beside the settings below.
VARIANTS = {
  "lean": {"model.lean_vjp": True},
  "fused mlp": {"model.mlp_kernel": "mosaic_gpu"},
  "plain": {},
}
FLOAT8 = {"model.fp8": "delayed", "model.fp8_fused": True}


class Jla:
  def hello(self):
    import jax
    import jla  # noqa: F401  (its absence should show here)

    packages = ("jax-linear-attention", "jax", "equinox", "optax")
    return {
      "library": "jax-linear-attention",
      "versions": {p: importlib.metadata.version(p) for p in packages},
      "device": jax.devices()[0].device_kind,
    }

  def train(self, config, spec, variant, warmups, steps):
    """Times updates; or {"fits": False} where memory does not suffice.

    Args:
      config: our model's; only Llama 3.2 1B's is known here.
      spec: see gpu_train_ours.py.
      variant: {"name": of VARIANTS, "microbatch": rows}.
      warmups: updates dropped.
      steps: updates timed.
    """
    import jax
    from jla.config import load_config
    from jla.launch_env import launch
    from jla.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / "experiment.json"
      # One more: with the next step on its way the last comes out short.
      asked = settings(
        config, spec, variant, warmups + steps + 1, f"{folder}/run"
      )
      file.write_text(json.dumps(asked))
      experiment = load_config(file, [])
      launch(experiment.runtime)
      try:
        # It logs to standard output, which is ours to answer on.
        with contextlib.redirect_stdout(sys.stderr):
          result = Trainer(experiment).run()
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        return {"fits": False}
    rows = result.history[warmups:-1]
    seconds = [row["step_time"] for row in rows]
    stats = jax.devices()[0].memory_stats() or {}
    return {
      "fits": True,
      "compile": None,
      "steps": seconds,
      "seconds": statistics.median(seconds),
      "loss": [row["loss"] for row in result.history],
      "peak": stats.get("peak_bytes_in_use"),
    }


def settings(config, spec, variant, steps, folder):
  """The experiment as nested tables, as its load_config takes them."""
  flat = {
    "model.preset": "transformer-1b",
    "model.vocab_size": config["vocab_size"],
    "model.d_model": config["embed_dim"],
    "model.n_layers": config["num_layers"],
    "model.d_ff": config["mlp_dim"],
    "model.tie_embeddings": config["tied_embeddings"],
    "model.norm_eps": config["norm_eps"],
    "model.remat": "none",
    "model.attention.num_heads": config["num_heads"],
    "model.attention.num_kv_heads": config["num_kv_heads"],
    "model.attention.head_dim": config["head_dim"],
    "model.attention.rope_theta": config["rope_theta"],
    "model.attention.qk_norm": False,
    "optim.schedule": "constant",
    "optim.lr": 1e-5,
    "train.max_steps": steps,
    "train.seq_len": spec["sequence"],
    "train.micro_batch_per_replica": variant["microbatch"],
    "train.grad_accum": spec["rows"] // variant["microbatch"],
    "train.log_every": 1,
    "train.dispatch_ahead": True,
    "train.update_guard": "select",
    "train.ce_impl": "auto",
    "train.ce_grad_in_forward": True,
    "train.final_eval": False,
    "train.save_final": False,
    "train.resume": "never",
    "train.loggers": [],
    "train.output_dir": folder,
    "data.source": "synthetic",
    "data.synthetic_kind": "uniform",
  }
  flat |= VARIANTS[variant["name"]]
  if spec["dtype"] == "float8":
    flat |= FLOAT8
  nested = {"name": "gpu-train"}
  for path, value in flat.items():
    *tables, key = path.split(".")
    place = nested
    for table in tables:
      place = place.setdefault(table, {})
    place[key] = value
  return nested


if __name__ == "__main__":
  cpu_worker.serve(Jla())
