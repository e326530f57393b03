"""Our side of the decoding benchmark: a worker (see cpu_worker.py).

What it and the others can do beyond what cpu_worker.py lists; `dtype` is
"float32", of ours also "int8", of llama.cpp also "q8_0":

  loss(ids, dtype)                  {"loss"}: nats, the mean over all rows'
                                    tokens but the first
  warm_mixed(prompts, news, dtype)  gets ready for these requests; {"choice"},
                                    and "tokens" as mixed if they are float32's
  mixed(prompts, news, dtype)       greedy, news[i] tokens after prompts[i], as
                                    fast as it can; {"seconds", "tokens"}
Ours alone has heldout(count), ids of text that no model has seen, and
export_gguf(folder): the model as f32.gguf and q8_0.gguf.
"""

import dataclasses
import functools
import pathlib
import statistics
import time

import cpu_ours
import cpu_worker

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Ours(cpu_ours.Ours):
  """llama_jax, with weights in 8 bits too."""

  def load(self, weights):
    answer = super().load(weights)
    llama = self._llamas["float32"]
    self._llamas["int8"] = dataclasses.replace(llama, quantize="int8")
    return answer

  def heldout(self, count):
    """Ids of this project's own documents."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(file.read_text() for file in files)
    return self._ids(text, count, seed=1)

  def export_gguf(self, folder):
    import jax.numpy as jnp
    from jax import tree

    from llama_jax.checkpoint import gguf

    llama = self._llamas["float32"]
    params = tree.map(lambda leaf: leaf.astype(jnp.float32), llama.params)
    path = pathlib.Path(folder)
    path.mkdir()
    # Without a tokenizer llama.cpp takes ids, and ids are all it is given.
    gguf.write(path / "f32.gguf", llama.config, params, None)
    gguf.write(path / "q8_0.gguf", llama.config, params, None, quantize="Q8_0")
    return {}

  def loss(self, ids, dtype):
    import jax
    import numpy as np

    # As it reads prompts: unrolled, and quantized where asked.
    decoder, params = self._llamas[dtype].unrolled
    run = jax.jit(functools.partial(_loss, decoder))
    rows = np.asarray(ids, np.int32)[:, None]
    return {"loss": statistics.fmean(float(run(params, row)) for row in rows)}

  def warm_mixed(self, prompts, news, dtype):
    # The same requests pass through the same programs.
    tokens = self.mixed(prompts, news, dtype)["tokens"]
    return {"choice": "llama_jax.decoding.engine.Engine", "tokens": tokens}

  def mixed(self, prompts, news, dtype):
    from llama_jax.decoding import engine as engine_lib
    from llama_jax.decoding import request, sampling

    greedy = sampling.SamplingConfig(temperature=0.0)
    requests = [
      request.Request(prompt, new, greedy)
      for prompt, new in zip(prompts, news, strict=True)
    ]
    engine = engine_lib.Engine(
      *self._llamas[dtype].unrolled, engine_lib.EngineConfig()
    )
    began = time.perf_counter()
    answers = engine.run(requests)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": [one.tokens for (one,) in answers]}


def _loss(decoder, params, ids_BT):
  import jax
  import jax.numpy as jnp

  positions_BT = jnp.arange(ids_BT.shape[1])[None]
  logits_BTV, _ = decoder.apply(
    {"params": params}, ids_BT, positions_BT, jnp.ones_like(ids_BT)
  )
  logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
  chosen = jnp.take_along_axis(logprobs_BTV, ids_BT[:, 1:, None], axis=-1)
  return -chosen.mean()


if __name__ == "__main__":
  cpu_worker.serve(Ours())
