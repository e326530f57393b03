"""A model at hand: what a notebook, generate and evaluate work with."""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import checkpoint, errors, kernels
from llama_jax.decoding import loop, placement, request, sampling
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import quantize as quantize_lib
from llama_jax.model import unrolled as unrolled_lib


@functools.partial(jax.jit, static_argnames=("decoder",))
def _logits(params, ids, positions, segments, *, decoder):
  return decoder.apply({"params": params}, ids, positions, segments)[0]


@dataclasses.dataclass
class Llama:
  """Weights, their shape and their tokenizer.

  Attributes:
    config: a model.config.LlamaConfig.
    params: nested dict of arrays, layers stacked (checkpoint/names.py).
    tokenizer: a text.Tokenizer, or None where the checkpoint has none.
    dtype: compute dtype, "float32" or "bfloat16".
    quantize: of the weights that decode, a key of model.quantize.KINDS; empty
      for none.
    mesh: that params lie on, or None for one device.
  """

  config: Any
  params: dict[str, Any]
  tokenizer: Any
  dtype: str = "float32"
  quantize: str = ""
  mesh: jax.sharding.Mesh | None = None

  @property
  def decoder(self) -> decoder_lib.Decoder:
    """For whole sequences: stacked params under a scan."""
    return decoder_lib.Decoder(self.config, dtype=self.dtype)

  @functools.cached_property
  def unrolled(self) -> tuple[decoder_lib.Decoder, dict[str, Any]]:
    """For decoding: a decoder and its own copy of the params, in dtype or
    quantized; on one device merged (unrolled.merge), on CPU in panels."""
    return self._unroll(self.params)

  def only_decode(self) -> None:
    """Frees params for those of `unrolled`; logits() is over then."""
    # A dict of our own, emptied as it goes, for others may hold the first.
    params, self.params = jax.tree.map(lambda leaf: leaf, self.params), {}
    if "unrolled" not in self.__dict__:
      self.unrolled = self._unroll(params, free=True)

  def _unroll(self, params: dict[str, Any], free: bool = False):
    """`unrolled`, of params; free: see unrolled.unstacked."""
    decoder = decoder_lib.Decoder(self.config, dtype=self.dtype, scan=False)
    alone = self.mesh is None
    cut = alone and not self.quantize and kernels.platform() == "cpu"
    parts = unrolled_lib.unstacked(params, alone, free)
    made: dict[str, Any] = {}
    self._quantized = quantize_lib.Report()
    for stored in parts:
      part = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), stored)
      if self.quantize:
        part = quantize_lib.quantize(part, self.quantize)
        self._quantized.add(stored, part)
      if cut:
        part = unrolled_lib.cut(part)
      del stored
      # Before the next: what a part was made of is not held for long.
      unrolled_lib.join(made, jax.block_until_ready(part))
    if self.mesh is not None:
      made = placement.place(decoder, made, self.mesh)
    return decoder, made

  def describe_quantized(self) -> str:
    """A line on what quantizing saved and cost; see model.quantize."""
    _ = self.unrolled
    return f"{self.quantize}: {self._quantized}"

  def logits(self, ids, positions=None, segment_ids=None) -> jax.Array:
    """Float32 logits [B, T, vocab] of int ids [B, T].

    Args:
      ids: token ids.
      positions: int [B, T]; 0, 1, 2 ... where not given.
      segment_ids: int [B, T]; tokens see only their own segment and 0 is
        padding; one segment where not given.
    """
    if not self.params:
      raise errors.UserError(
        "Only what decodes is held (only_decode); load the checkpoint again."
      )
    ids = jnp.asarray(ids, jnp.int32)
    if ids.ndim != 2:
      raise errors.UserError(
        f"ids has shape {ids.shape}; give [batch, tokens], as in [[1, 2, 3]]."
      )
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    if segment_ids is None:
      segment_ids = jnp.ones(ids.shape, jnp.int32)
    rest = (jnp.asarray(positions, jnp.int32), jnp.asarray(segment_ids))
    for name, one in zip(("positions", "segment_ids"), rest, strict=True):
      if one.shape != ids.shape:
        raise errors.UserError(
          f"{name} has shape {one.shape}; it must be that of ids, {ids.shape}."
        )
    with placement.on(self.mesh):
      return _logits(self.params, ids, *rest, decoder=self.decoder)

  def encode_prompt(self, prompt: str) -> list[int]:
    """Ids of a plain prompt, with BOS where the model is used to one."""
    tokenizer = self.need_tokenizer()
    return tokenizer.encode(prompt, bos=tokenizer.add_bos)

  def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's turn."""
    from llama_jax.text import chat

    return chat.render(self.need_tokenizer(), messages).ids

  def stream(
    self,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling_config: sampling.SamplingConfig,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    continues: bool = False,
  ) -> Generator[str, None, str]:
    """Text as it is decoded, in whole characters, without the stop token.

    stop: texts that end the answer too; none of them is part of it.
    stop_ids: what ends it instead of the tokenizer's stop tokens.
    continues: it goes on in a text, so a leading space counts.

    The generator returns why the answer ended, request.STOP or LENGTH.
    """
    for (text,), (stopped,) in self._stream(
      [list(prompt)],
      stop,
      stop_ids,
      continues,
      max_new_tokens=max_new_tokens,
      sampling_config=sampling_config,
    ):
      reason = request.STOP if stopped else request.LENGTH
      if text:
        yield text
    return reason

  def generate(
    self,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[str] = (),
  ):
    """Continues a prompt: the new text alone, up to a stop token.

    Args:
      prompt: a text, or several to decode as one batch (then a list returns).
      max_new_tokens: at most this many.
      temperature, top_p, top_k, seed: see decoding.sampling; 0 is greedy.
      stop: texts that end an answer too; none of them is part of it.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    pieces = self._stream(
      [self.encode_prompt(one) for one in prompts],
      stop,
      max_new_tokens=max_new_tokens,
      sampling_config=sampling.SamplingConfig(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
      ),
    )
    rows = zip(*(new for new, _ in pieces), strict=True)
    texts = ["".join(row) for row in rows]
    return texts[0] if isinstance(prompt, str) else texts

  def _stream(
    self, prompts, stop, stop_ids=None, continues=False, **settings
  ) -> Iterator[tuple[list[str], list[bool]]]:
    """Each row's new text and whether it was stopped, until all have ended."""
    from llama_jax.text import stream as stream_lib

    tokenizer = self.need_tokenizer()
    decoder, params = self.unrolled
    rows = [
      stream_lib.Detokenizer(tokenizer, continues, stop_strings=stop)
      for _ in prompts
    ]
    stop_ids = tokenizer.stop_ids if stop_ids is None else tuple(stop_ids)
    ends = set(stop_ids)
    stopped = [False] * len(prompts)
    for new in loop.stream(
      decoder, params, prompts, stop_ids=stop_ids, mesh=self.mesh, **settings
    ):
      texts = [
        row.push_many(i for i in ids if i not in ends)
        for row, ids in zip(rows, new, strict=True)
      ]
      for index, (row, ids) in enumerate(zip(rows, new, strict=True)):
        if row.stopped is not None or not ends.isdisjoint(ids):
          stopped[index] = True
      yield texts, stopped
      if all(stopped):
        break
    yield [row.flush() for row in rows], stopped

  def need_tokenizer(self):
    """The tokenizer; raises UserError where the checkpoint has none."""
    if self.tokenizer is None:
      raise errors.UserError(
        "This checkpoint has no tokenizer, so it speaks ids only; put"
        " tokenizer.json beside its weights, or use logits()."
      )
    return self.tokenizer


def load(
  reference: str,
  *,
  dtype: str = "float32",
  quantize: str = "",
  knob="reference",
  mesh: jax.sharding.Mesh | None = None,
  head: str = "words",
) -> Llama:
  """Loads a checkpoint of any format onto the first device or a mesh.

  Args:
    reference: scheme:path.
    dtype: compute dtype; params keep the dtype they are stored in.
    quantize: "int8" or "int4" weights for decoding; see Llama.
    knob: what an error message calls the reference.
    mesh: parallel.mesh.make's; params are read part by part onto its devices.
    head: "words" for a language model, "scalar" for a reward model.

  Raises:
    errors.UserError: for a bad reference, damaged files or the other kind.
    errors.ConfigError: the mesh does not divide the model.
  """
  config = checkpoint.read_config(reference, knob)
  if config.head != head:
    is_a, wanted = "a language model", "a reward model"
    if head == "words":
      is_a, wanted = "a reward model, which says no words", "a language model"
    raise errors.UserError(f"{knob}={reference} is {is_a}; name {wanted}.")
  shardings = None
  if mesh is not None:
    placement.check(config, mesh, quantize)
    shardings = placement.shardings(config, mesh)
  config, params, tokenizer = checkpoint.load(reference, knob, shardings)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf,
    params,
  )
  return Llama(config, params, tokenizer, dtype, quantize, mesh)
