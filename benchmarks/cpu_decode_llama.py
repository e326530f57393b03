"""llama.cpp's side of the decoding benchmark (see cpu_decode_ours.py).

Runs in an environment of its own that has llama-cpp-python, of which only the
functions of llama.h are used. Weights are a folder with f32.gguf and q8_0.gguf,
and a dtype says which. Keys and values may be kept in several ways: for each
piece of work, what was fastest while warming up is measured.
"""

import collections
import itertools
import pathlib
import statistics
import time

import cpu_worker
import numpy as np

FILES = {"float32": "f32.gguf", "q8_0": "q8_0.gguf"}
# Bytes of a key's number; whether flash attention reads it.
WAYS = {
  "float32 cache": (4, False),
  "float16 cache": (2, False),
  "float16 cache, flash attention": (2, True),
}
EXACT = "float32 cache"
# Tokens of a prompt in one call: llama.cpp's own default.
CHUNK = 512
# Requests that run at once: as many as in our engine.
AT_ONCE = 32
# What a context's tokens are rounded up to, so that warming up serves.
ROOM = 256


class Llama:
  """llama.cpp, asked from one thread."""

  def __init__(self):
    self._models, self._contexts, self._choices = {}, {}, {}

  def hello(self):
    import importlib.metadata

    import llama_cpp

    packages = ("llama-cpp-python", "numpy")
    return {
      "library": "llama.cpp",
      "threads": cpu_worker.cores(),
      "versions": {p: importlib.metadata.version(p) for p in packages},
      "system": llama_cpp.llama_print_system_info().decode(),
      "ways": list(WAYS),
    }

  def load(self, weights):
    self._folder = pathlib.Path(weights)
    return {}

  def logits(self, ids, file, way=EXACT):
    context = self._context("float32", way, 1, len(ids[0]))
    np.save(file, np.stack([context.logits(row) for row in ids]))
    return {}

  def loss(self, ids, dtype):
    context = self._context(dtype, EXACT, 1, len(ids[0]))
    return {"loss": statistics.fmean(_loss(context, row) for row in ids)}

  def prefill(self, ids, dtype):
    key, room = ("prefill", dtype), (1, len(ids[0]))
    if key not in self._choices:
      self._choose(key, room, lambda c: min(_read(c, ids)[1] for _ in range(2)))
    way = self._choices[key]
    _, seconds = _read(self._context(dtype, way, *room), ids)
    return {"seconds": seconds, "choice": way}

  def warm(self, ids, new, dtype):
    def step(context):
      times = _decode(context, ids, new)[1][1:]
      return statistics.median(b - a for a, b in itertools.pairwise(times))

    room = len(ids), len(ids[0]) + new
    answer = self._choose(("decode", len(ids), dtype), room, step)
    return answer | {"cache_itemsize": WAYS[answer["choice"]][0]}

  def decode(self, ids, new, dtype):
    way = self._choices.get(("decode", len(ids), dtype), EXACT)
    context = self._context(dtype, way, len(ids), len(ids[0]) + new)
    tokens, times = _decode(context, ids, new)
    return {
      "tokens": tokens,
      "first": times[1] - times[0],
      "rest": times[-1] - times[1],
    }

  def warm_mixed(self, prompts, news, dtype):
    """Tries each way on the first of the requests."""
    some = AT_ONCE // 2
    return self._choose(
      ("mixed", dtype),
      _room(prompts, news),
      lambda context: serve(context, prompts[:some], news[:some])[1],
    )

  def mixed(self, prompts, news, dtype):
    way = self._choices["mixed", dtype]
    context = self._context(dtype, way, *_room(prompts, news))
    tokens, seconds = serve(context, prompts, news)
    return {"seconds": seconds, "tokens": tokens}

  def speak(self, weights, ids, new, dtype, began, cache):
    del began, cache  # nothing is compiled
    self.load(weights)
    self.decode(ids, new, dtype)
    return {"peak": cpu_worker.peak_bytes()}

  def _choose(self, key, room, run):
    """Keeps the way in which run(context) takes the fewest seconds.

    key: the work, with the dtype last; room: as _context takes it.
    """
    found = {}
    for way in WAYS:
      found[way] = run(self._context(key[-1], way, *room))
    best = min(found, key=found.get)
    self._choices[key] = best
    for name in list(self._contexts):
      if name[0] == key[-1] and name[1] != best:
        self._contexts.pop(name).close()
    return {"choice": best, "seconds": found}

  def _context(self, dtype, way, sequences, tokens):
    """Made once, so that its memory is touched before anything is timed."""
    tokens = -(-tokens // ROOM) * ROOM
    name = (dtype, way, sequences, tokens)
    if name not in self._contexts:
      self._contexts[name] = Context(
        self._model(dtype), *WAYS[way], sequences, tokens
      )
    return self._contexts[name]

  def _model(self, dtype):
    import llama_cpp

    if dtype not in self._models:
      llama_cpp.llama_backend_init()
      file = self._folder / FILES[dtype]
      params = llama_cpp.llama_model_default_params()
      params.n_gpu_layers = 0
      model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
      if not model:
        raise ValueError(f"llama.cpp does not load {file}")
      self._models[dtype] = model
    return self._models[dtype]


class Context:
  """Keys and values of some sequences, and a batch to decode with.

  Args:
    model: of llama.cpp.
    itemsize, flash: see WAYS.
    sequences: how many.
    tokens: that each has room for.
  """

  def __init__(self, model, itemsize, flash, sequences, tokens):
    import llama_cpp

    self._lib = llama_cpp
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = sequences * tokens
    params.n_batch = params.n_ubatch = CHUNK
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = cpu_worker.cores()
    name = {4: "GGML_TYPE_F32", 2: "GGML_TYPE_F16"}[itemsize]
    params.type_k = params.type_v = getattr(llama_cpp, name)
    params.flash_attn_type = int(flash)
    self._context = llama_cpp.llama_init_from_model(model, params)
    if not self._context:
      raise ValueError(f"llama.cpp makes no context of {sequences} x {tokens}")
    self._memory = llama_cpp.llama_get_memory(self._context)
    self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
    vocab = llama_cpp.llama_model_get_vocab(model)
    self._words = llama_cpp.llama_vocab_n_tokens(vocab)

  def close(self):
    self._lib.llama_batch_free(self._batch)
    self._lib.llama_free(self._context)

  def clear(self):
    self._lib.llama_memory_clear(self._memory, False)

  def forget(self, sequence):
    self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

  def logits(self, tokens):
    """After each token of a fresh sequence, float32 [T, vocab]."""
    self.clear()
    rows = []
    for start in range(0, len(tokens), CHUNK):
      part = tokens[start : start + CHUNK]
      self._run([(t, start + i, 0, True) for i, t in enumerate(part)])
      rows += [self._row(i).copy() for i in range(len(part))]
    return np.stack(rows)

  def read(self, sequence, tokens):
    """The best token after a prompt, with which the sequence begins."""
    for start in range(0, len(tokens), CHUNK):
      part = tokens[start : start + CHUNK]
      ends = start + len(part) == len(tokens)
      self._run(
        [
          (t, start + i, sequence, ends and i == len(part) - 1)
          for i, t in enumerate(part)
        ]
      )
    return int(self._row(len(part) - 1).argmax())

  def draw(self, lasts):
    """The best tokens after (token, position, sequence) of each."""
    self._run([(*last, True) for last in lasts])
    return [int(self._row(i).argmax()) for i in range(len(lasts))]

  def _run(self, entries):
    batch = self._batch
    batch.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
      batch.token[i] = token
      batch.pos[i] = position
      batch.n_seq_id[i] = 1
      batch.seq_id[i][0] = sequence
      batch.logits[i] = wanted
    status = self._lib.llama_decode(self._context, batch)
    if status:
      raise ValueError(f"llama_decode gave {status}")

  def _row(self, i):
    """What the i-th entry gave; good until the next run."""
    row = self._lib.llama_get_logits_ith(self._context, i)
    return np.ctypeslib.as_array(row, (self._words,))


def _room(prompts, news):
  longest = max(len(p) + n for p, n in zip(prompts, news, strict=True))
  return AT_ONCE, longest


def _loss(context, row):
  logits = context.logits(row)[:-1]
  largest = logits.max(-1, keepdims=True)
  sums = np.exp(logits - largest).sum(-1, dtype=np.float64)
  chosen = logits[np.arange(len(logits)), row[1:]]
  return float((np.log(sums) + largest[:, 0] - chosen).mean())


def _read(context, prompts):
  """Each prompt's first token, and the seconds it took."""
  context.clear()
  began = time.perf_counter()
  tokens = [context.read(i, prompt) for i, prompt in enumerate(prompts)]
  return tokens, time.perf_counter() - began


def _decode(context, prompts, new):
  """Greedy tokens, and times: of the call and of each row's tokens."""
  times = [time.perf_counter()]
  lasts, _ = _read(context, prompts)
  rows = [[token] for token in lasts]
  times.append(time.perf_counter())
  for count in range(1, new):
    lasts = context.draw(
      [
        (token, len(prompt) + count - 1, i)
        for i, (token, prompt) in enumerate(zip(lasts, prompts, strict=True))
      ]
    )
    for row, token in zip(rows, lasts, strict=True):
      row.append(token)
    times.append(time.perf_counter())
  return rows, times


def serve(context, prompts, news):
  """Answers requests, greedily, as places come free.

  Returns news[i] tokens after prompts[i], and the seconds all took.
  """
  context.clear()
  waiting = collections.deque(range(len(prompts)))
  free = list(range(AT_ONCE))
  running = {}  # place -> request
  answers = [[] for _ in prompts]

  def take(place, token):
    request = running[place]
    answers[request].append(token)
    if len(answers[request]) == news[request]:
      del running[place]
      context.forget(place)
      free.append(place)

  began = time.perf_counter()
  while waiting or running:
    while free and waiting:
      place, request = free.pop(), waiting.popleft()
      running[place] = request
      take(place, context.read(place, prompts[request]))
    lasts = [
      (answers[r][-1], len(prompts[r]) + len(answers[r]) - 1, place)
      for place, r in running.items()
    ]
    if lasts:
      for last, token in zip(lasts, context.draw(lasts), strict=True):
        take(last[-1], token)
  return answers, time.perf_counter() - began


if __name__ == "__main__":
  cpu_worker.serve(Llama())
