"""A tokenizer trained on text, and what was counted on the way.

The text is read twice and never held whole: first to count it, then to train
on it, or on a random part of its lines where it has more than sample_bytes
(training takes some eight times as much memory as what it trains on).
Every hundredth document of a domain, its tenth the first, is not trained on;
on these, bytes per token are measured, to 4 MB a domain.
"""

import collections
import dataclasses
import pathlib
import random
from collections.abc import Iterator

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.data import records, sources
from llama_jax.text import files, train_sentencepiece

HELDOUT_EVERY = 100
HELDOUT_FIRST = 9
HELDOUT_BYTES = 4_000_000


@dataclasses.dataclass
class Domain:
  """A part of the text, and what was counted in it.

  Attributes:
    documents, bytes: of all of it, held out or not.
    training_bytes: of what may be trained on.
    heldout: the documents to measure on.
  """

  documents: int = 0
  bytes: int = 0
  training_bytes: int = 0
  heldout: list[str] = dataclasses.field(default_factory=list)

  def add(self, text: str, is_heldout: bool) -> None:
    size = len(text.encode())
    self.documents += 1
    self.bytes += size
    if not is_heldout:
      self.training_bytes += size
    elif not self.heldout or self.heldout_bytes + size <= HELDOUT_BYTES:
      self.heldout.append(text)

  @property
  def heldout_bytes(self) -> int:
    return sum(len(text.encode()) for text in self.heldout)


def read(text: str) -> Iterator[tuple[str, bool, str]]:
  """(domain, whether it is held out, text) of each document, in order."""
  roots = [pathlib.Path(path) for path in sources.named(text)]
  one_folder = len(roots) == 1 and roots[0].is_dir()
  seen = collections.Counter()
  for path, document in sources.stream(text, "--text"):
    if one_folder:
      below = path.relative_to(roots[0]).parts
      alone = len(below) > 1 or records.format_of(path) == "jsonl"
      name = below[0] if alone else roots[0].name
    else:
      name = next(str(r) for r in roots if r == path or r in path.parents)
    yield name, seen[name] % HELDOUT_EVERY == HELDOUT_FIRST, document
    seen[name] += 1


def count(text: str) -> dict[str, Domain]:
  """Name -> Domain of all of the text.

  Raises:
    BadFileError: it cannot be read, or there is none.
  """
  domains = collections.defaultdict(Domain)
  for name, is_heldout, document in read(text):
    domains[name].add(document, is_heldout)
  if not domains:
    raise errors.BadFileError(f"--text={text} holds no text.")
  return dict(domains)


def sample(text: str, share: float, seed: int) -> Iterator[str]:
  """Lines to train on, each with this chance; all where it is 1 or more."""
  draws = random.Random(seed)
  for _, is_heldout, document in read(text):
    if not is_heldout:
      for line in train_sentencepiece.sentences(document):
        if draws.random() < share:
          yield line


def check_new(out: pathlib.Path) -> None:
  if out.exists():
    raise errors.UserError(
      f"--train_tokenizer={out} exists; name another file or remove it."
    )


def train(
  out: pathlib.Path, text: str, vocab_size: int, sample_bytes: int, seed: int
) -> None:
  """Reads, trains, writes OUT whole or not at all, and reports.

  Raises:
    UserError: OUT is there already, the text cannot be read, or it is too
      small for vocab_size.
  """
  check_new(out)
  domains = count(text)
  total = sum(domain.training_bytes for domain in domains.values())
  share = sample_bytes / max(total, 1)
  used = f"all {total:,}" if share >= 1 else f"{sample_bytes:,} of {total:,}"
  print(f"training {vocab_size:,} pieces on {used} bytes")
  model = train_sentencepiece.train(sample(text, share, seed), vocab_size)
  check_new(out)  # training takes long
  out.parent.mkdir(parents=True, exist_ok=True)
  files.write(out, model)
  tokenizer = text_lib.load_tokenizer(out)
  width = max(len("domain"), *map(len, domains))
  print(
    f"{'domain':<{width}} {'documents':>11} {'bytes':>15}"
    f" {'held out':>10} {'bytes/token':>14}"
  )
  for name, domain in domains.items():
    tokens = sum(map(len, tokenizer.encode_batch(domain.heldout)))
    rate = f"{domain.heldout_bytes / tokens:.3f}" if tokens else "nothing held"
    print(
      f"{name:<{width}} {domain.documents:>11,} {domain.bytes:>15,}"
      f" {domain.heldout_bytes:>10,} {rate:>14}"
    )
  print(f"written to {out}")
