"""transformers' side of the decoding benchmark (see cpu_decode_ours.py)."""

import statistics

import cpu_peer
import cpu_worker

# Requests that are padded to one batch.
ROWS = 8
# Ways to answer requests: the order in which batches are made, the cache.
WAYS = (
  ("in order of arrival", "dynamic"),
  ("in order of length", "dynamic"),
  ("in order of length", "static"),
)


class Peer(cpu_peer.Peer):
  """Plain use of transformers."""

  def loss(self, ids, dtype):
    import torch

    del dtype
    with torch.inference_mode():
      rows = [torch.tensor([row]) for row in ids]
      losses = [self._model(input_ids=r, labels=r).loss.item() for r in rows]
    return {"loss": statistics.fmean(losses)}

  def warm_mixed(self, prompts, news, dtype):
    """Tries each way on the first of the requests and keeps the fastest."""
    some = 2 * ROWS
    found = {}
    for way in WAYS:
      answer = self._mixed(prompts[:some], news[:some], way)
      found[way] = answer["seconds"]
    best = min(found, key=found.get)
    self._choices["mixed", dtype] = best
    return {
      "choice": ", ".join(best),
      "seconds": {", ".join(way): s for way, s in found.items()},
      "tokens": answer["tokens"],
    }

  def mixed(self, prompts, news, dtype):
    return self._mixed(prompts, news, self._choices["mixed", dtype])

  def _mixed(self, prompts, news, way):
    """Padded batches, each until its longest answer is done."""
    order, cache = way
    numbers = list(range(len(prompts)))
    if order == "in order of length":
      numbers.sort(key=lambda i: (news[i], len(prompts[i])))
    tokens = [None] * len(prompts)
    seconds = 0.0
    for start in range(0, len(numbers), ROWS):
      batch = numbers[start : start + ROWS]
      width = max(len(prompts[i]) for i in batch)
      blanks = [width - len(prompts[i]) for i in batch]
      pairs = list(zip(blanks, batch, strict=True))
      ids = [[0] * blank + prompts[i] for blank, i in pairs]
      mask = [[0] * blank + [1] * len(prompts[i]) for blank, i in pairs]
      new = max(news[i] for i in batch)
      rows, stamps = self._generate(ids, new, "float32", cache, mask)
      seconds += stamps[-1] - stamps[0]
      for i, row in zip(batch, rows, strict=True):
        tokens[i] = row[: news[i]]
    return {"seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
  cpu_worker.serve(Peer())
