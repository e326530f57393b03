"""A text becomes a document to pack: its ids, some of them cut for infilling.

Code Llama's way (arXiv:2308.12950, 2.3): a document that one row holds whole
is cut at two letters drawn uniformly, with a probability, and is written in
the order PSM or SPM, half and half.
"""

import hashlib
import random

from llama_jax import errors
from llama_jax.data import packing
from llama_jax.text import infill as infill_lib
from llama_jax.text import tokenizer as tokenizer_lib

DIGEST_BYTES = 16


def digest(text: bytes) -> bytes:
  """What tells one text from another."""
  return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def is_held_out(digest_: bytes, share: float) -> bool:
  """Whether a text is kept from training, by its digest alone."""
  return int.from_bytes(digest_[-8:], "big") < share * 2**64


class Encoder:
  """Documents of a source; what is drawn hangs on seed, source and index.

  Args:
    row_length: an infilled document has no more tokens than that.
    infill_rate: share of the documents that are cut, 0 to 1.

  Attributes:
    psm, spm: documents that were cut so far, by order.

  Raises:
    ConfigError: the tokenizer has no token that ends a text, or none for
      infilling.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    row_length: int,
    infill_rate: float = 0.0,
    seed: int = 0,
  ):
    if tokenizer.eos_id is None:
      raise errors.ConfigError(
        "the tokenizer has no token that ends a text (eos), so documents could"
        " not be told apart; take one that has."
      )
    self._tokenizer = tokenizer
    self._row_length = row_length
    self._bos = tokenizer.add_bos and tokenizer.bos_id is not None
    self._rate = infill_rate
    self._seed = seed
    self._infill = None
    self.psm = self.spm = 0
    if infill_rate:
      try:
        self._infill = infill_lib.Infill(tokenizer)
        self._infill.prompt("a", "b", suffix_first=True)
      except errors.UserError as error:
        raise errors.ConfigError(
          f"infill_rate={infill_rate}: {error} Or use infill_rate=0."
        ) from None

  def document(
    self, text: str, index: int, source: str = ""
  ) -> packing.Document:
    """The ids of a text, BOS (where the model has it) and EOS included."""
    if self._infill is not None:
      draws = random.Random(f"{self._seed} {source} {index}")
      if draws.random() < self._rate:
        suffix_first = draws.random() < 0.5
        cuts = (draws.randint(0, len(text)), draws.randint(0, len(text)))
        parts = infill_lib.split(text, *cuts)
        ids = self._infill.document(*parts, suffix_first=suffix_first)
        if len(ids) <= self._row_length:
          self.psm += not suffix_first
          self.spm += suffix_first
          return packing.Document(ids, index, whole=True)
    ids = self._tokenizer.encode(text, bos=self._bos, eos=True)
    return packing.Document(ids, index)
