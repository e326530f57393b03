"""Brings weights from one format to another, with a proof.

  python -m llama_jax.convert --src=gguf:FILE --dst=orbax:DIR [--nocheck]

Reads gguf:, hf: and orbax:, writes orbax: and hf:. The destination is read
back and proven before it gets its name: every tensor of the foreign side,
brought back from ours, hashes the same; and a plain NumPy Llama on the foreign
tensors, in their own names and RoPE layout, gives the same logits and loss as
our model on what was written.
"""

import importlib
import time

import jax
import numpy as np
from absl import flags

from llama_jax import checkpoint, errors, shell
from llama_jax.checkpoint import atomic, proof
from llama_jax.model import decoder as decoder_lib

WRITES = ("orbax", "hf")
PROOF = "conversion.txt"

# Two float32 forwards that sum in another order differ by about 1e-4 on logits
# of size 40; a wrong RoPE layout differs by tens, and its loss by 2 nats.
MAX_LOGIT_DIFFERENCE = 1e-2
MAX_LOSS_DIFFERENCE = 1e-3


def convert(source: str, destination: str, *, verify: bool) -> None:
  """Reads, writes, proves, and only then names the destination."""
  source_format, _ = checkpoint.parse(source, "--src")
  scheme, path = checkpoint.parse(destination, "--dst")
  if scheme not in WRITES:
    allowed = " or ".join(f"{name}:DIR" for name in WRITES)
    raise errors.UserError(
      f"--dst={destination}: {scheme} cannot be written yet; use {allowed}."
    )
  if scheme == source_format == "orbax":
    raise errors.UserError(
      f"--src={source} and --dst={destination} are both orbax; copy the folder."
    )
  atomic.check_new(path)
  start = time.monotonic()
  model = checkpoint.load(source, "--src")
  leaves = jax.tree.leaves(model.params)
  needed = sum(leaf.nbytes for leaf in leaves)
  dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
  print(
    f"read     {source}: {sum(leaf.size for leaf in leaves):,} parameters,"
    f" {needed / 1e6:,.0f} MB as {dtypes},"
    f" {_tokenizer(model.tokenizer)}, {time.monotonic() - start:.1f} s",
    flush=True,
  )
  # A tenth on top for metadata, the tokenizer and filesystem blocks.
  atomic.check_free(path, int(needed * 1.1) + (16 << 20))
  module = importlib.import_module(checkpoint.FORMATS[scheme])
  with atomic.new_folder(path) as part:
    start = time.monotonic()
    module.write_into(part, *model)
    print(f"written  {time.monotonic() - start:.1f} s", flush=True)
    if verify:
      shown = prove(source, f"{scheme}:{part}").replace(str(part), path)
      atomic.write_text(part / PROOF, shown)
  print(f"done     {destination}")
  if verify:
    print(f"proof    {PROOF} in it has every tensor's shape, dtype and hash")


def _tokenizer(tokenizer) -> str:
  if tokenizer is None:
    return "no tokenizer"
  template = "" if tokenizer.chat_template is None else " and a chat template"
  return f"a tokenizer of {tokenizer.vocab_size:,} words{template}"


def prove(source: str, written: str) -> str:
  """The proof that what was written is what was read, a line a tensor.

  Raises BadFileError where it is not.
  """
  config, params, tokenizer = checkpoint.load(written, "--dst")
  foreign = [
    reference
    for reference in (source, written)
    if not reference.startswith("orbax:")
  ]
  tables = [account(reference, config, params) for reference in foreign]
  outcome = forward(foreign[0], config, params, tokenizer)
  return "\n".join([*tables, outcome + "\n"])


def account(reference: str, config, params) -> str:
  """Every tensor, both ways, as a table; raises where one differs."""
  module, path = checkpoint.find(reference)
  theirs, tensors = module.open_tensors(path)
  if theirs != config:
    raise errors.BadFileError(
      f"{reference}: its config {theirs} is not the written one, {config}."
    )
  entries = proof.account(config, tensors, params)
  table = proof.table(entries)
  same = sum(entry.same for entry in entries)
  if same != len(entries):
    print(table)
    raise errors.BadFileError(f"{reference}: tensors differ; see the table.")
  print(
    f"tensors  {same} of {len(entries)} the same, there and back", flush=True
  )
  return f"{reference}\n{table}\n"


def forward(reference: str, config, params, tokenizer) -> str:
  """A forward of the foreign layout against ours on the built-in text.

  Returns the outcome in a line; raises BadFileError where they disagree.
  """
  module, path = checkpoint.find(reference)
  _, tensors = module.open_tensors(path)
  if tokenizer is not None:
    ids = tokenizer.encode(proof.TEXT)
  else:
    ids = [byte % config.vocab_size for byte in proof.TEXT.encode()]
  ids = ids[: config.context_length]
  theirs = proof.reference_logits(config, tensors.get, ids, tensors.scheme)
  ids_BT = np.asarray([ids], np.int32)
  ours = decoder_lib.Decoder(config).apply(
    {"params": params},
    ids_BT,
    np.arange(len(ids), dtype=np.int32)[None],
    np.ones_like(ids_BT),
  )[0][0]
  worst, their_loss, our_loss = proof.compare(theirs, np.asarray(ours), ids)
  outcome = (
    f"forward  {len(ids)} tokens: largest logit difference {worst:.2e} (logits"
    f" up to {np.abs(theirs).max():.1f}), mean loss {their_loss:.6f} there and"
    f" {our_loss:.6f} here, difference {abs(their_loss - our_loss):.1e} nats"
  )
  print(outcome, flush=True)
  scale = max(1.0, float(np.abs(theirs).max()) / 40)
  if not (
    worst <= MAX_LOGIT_DIFFERENCE * scale
    and abs(their_loss - our_loss) <= MAX_LOSS_DIFFERENCE
  ):
    raise errors.BadFileError(
      f"{reference}: our model does not compute what this checkpoint does; it"
      " was not written."
    )
  return outcome


def main(argv) -> None:
  del argv
  for knob, value in (("--src", _SRC.value), ("--dst", _DST.value)):
    if not value:
      raise errors.UserError(f"{knob}=SCHEME:PATH is needed.")
  convert(_SRC.value, _DST.value, verify=_CHECK.value)


if __name__ == "__main__":
  _SRC = flags.DEFINE_string("src", None, "gguf:FILE, hf:DIR or orbax:DIR.")
  _DST = flags.DEFINE_string("dst", None, "orbax:DIR or hf:DIR.")
  _CHECK = flags.DEFINE_boolean("check", True, "Read back and prove.")
  shell.run(main)
