"""The decode loop against full forwards, one prompt at a time."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.decoding import loop, request, sampling
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib

NANO = sizes.get("nano")
DECODER = decoder_lib.Decoder(NANO, scan=False)
GREEDY = sampling.SamplingConfig()
WARM_ALL = sampling.SamplingConfig(temperature=1.0, seed=4)
WARM = sampling.SamplingConfig(temperature=1.0, top_k=50, seed=4)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(512, size=size).tolist() for size in (13, 1, 40)]


@pytest.fixture(scope="module")
def stacked(random_params):
  return random_params(NANO)


@pytest.fixture(scope="module")
def params(stacked):
  return jax.tree.map(jax.numpy.asarray, unrolled_lib.unstack(stacked))


def generate(params, prompts, new=20, stop=(), config=GREEDY, **settings):
  return loop.generate(
    DECODER,
    params,
    prompts,
    max_new_tokens=new,
    sampling_config=config,
    stop_ids=stop,
    **settings,
  )


@functools.partial(jax.jit, static_argnames="decoder")
def full(params, *batch, decoder):
  return decoder.apply({"params": params}, *batch)[0]


def test_greedy_is_the_argmax_of_full_forwards(params, stacked):
  """By causality one forward over all tokens shows each step's argmax."""
  rows = generate(params, PROMPTS)
  for prompt, new in zip(PROMPTS, rows, strict=True):
    assert len(new) == 20
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(prompt) + 20] = prompt + new
    logits = full(
      stacked,
      ids,
      np.arange(64, dtype=np.int32)[None],
      np.ones_like(ids),
      decoder=DECODER.clone(scan=True),
    )
    first = len(prompt) - 1
    want = logits[0, first : first + 20].argmax(-1)
    assert new == want.tolist()
  # Not one word over and over, which much would equal.
  assert len({token for row in rows for token in row}) > 10


def test_a_batch_equals_each_alone(params):
  rows = generate(params, PROMPTS)
  for prompt, row in zip(PROMPTS, rows, strict=True):
    assert generate(params, [prompt]) == [row]


def test_a_draw_does_not_depend_on_its_neighbours(params):
  """Row i of a batch is the request of seed + i alone."""
  rows = generate(params, PROMPTS, config=WARM)
  assert rows != generate(params, PROMPTS)
  for index, prompt in enumerate(PROMPTS):
    alone = sampling.SamplingConfig(1.0, 50, seed=WARM.seed + index)
    assert generate(params, [prompt], config=alone) == [rows[index]]


@pytest.mark.parametrize("config", [GREEDY, WARM], ids=["greedy", "warm"])
def test_tokens_per_call_does_not_matter(params, config):
  want = generate(params, PROMPTS, config=config)
  for count in (1, 7):
    ours = generate(params, PROMPTS, config=config, tokens_per_call=count)
    assert ours == want


@pytest.mark.parametrize("new", [1, 2, 8, 9, 10])
def test_max_new_tokens(params, new):
  whole = generate(params, PROMPTS)
  assert generate(params, PROMPTS, new) == [row[:new] for row in whole]


def test_each_row_ends_at_its_first_stop_token(params):
  whole = generate(params, PROMPTS)
  # One early, one late; each row ends at whichever of them it meets first.
  stops = {whole[0][2], whole[1][9], whole[2][0]}
  ours = generate(params, PROMPTS, stop=tuple(stops))
  for row, full_row in zip(ours, whole, strict=True):
    hits = [i for i, token in enumerate(full_row) if token in stops]
    assert row == full_row[: hits[0] + 1]
  assert len({len(row) for row in ours}) > 1


def test_stream_gives_the_same_in_pieces(params):
  pieces = list(
    loop.stream(
      DECODER,
      params,
      PROMPTS,
      max_new_tokens=20,
      sampling_config=GREEDY,
      stop_ids=(),
    )
  )
  assert len(pieces) > 2
  joined = [
    [token for piece in pieces for token in piece[row]] for row in range(3)
  ]
  assert joined == generate(params, PROMPTS)


def test_the_whole_context_can_be_used(params):
  prompt = RNG.integers(512, size=NANO.context_length - 3).tolist()
  assert len(generate(params, [prompt], 3)[0]) == 3


@pytest.mark.parametrize(
  "prompt, new, said",
  [
    (10, 0, ["--max_new_tokens=0"]),
    (0, 5, ["prompt is empty"]),
    (250, 7, ["250 tokens", "context of 256", "--max_new_tokens=6 or less"]),
    (256, 1, ["256 tokens", "context of 256", "shorten the prompt"]),
    (999, 1, ["999 tokens", "context of 256", "shorten the prompt"]),
  ],
)
def test_lengths_that_do_not_fit(prompt, new, said):
  with pytest.raises(errors.UserError) as caught:
    request.check_length(prompt, new, 256)
  for words in said:
    assert words in str(caught.value)
  request.check_length(250, 6, 256)


def test_a_request_that_does_not_fit_is_refused_before_work(params):
  for prompts, new in (([[1] * 300], 1), ([[1], []], 4), ([[1]], 0)):
    with pytest.raises(errors.UserError):
      generate(params, prompts, new)


def computations(program):
  """name -> lines of each computation of a compiled program."""
  blocks = re.findall(
    r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S
  )
  return {name: text.splitlines() for name, text in blocks}


def work_on_whole_caches(program, size):
  """Instructions inside a loop that make an array as large as a cache.

  A write in place (dynamic-update-slice, alone or as the root of a fusion) is
  the one that decoding needs; names for what is there already are no work.
  """
  blocks = computations(program)
  wanted = re.findall(r"\bwhile\(.*body=%?([\w.\-]+)", program)
  assert wanted
  writes, others, seen = 0, [], set()
  while wanted:
    name = wanted.pop()
    if name in seen:
      continue
    seen.add(name)
    for line in blocks[name]:
      # Inside a fusion nothing is stored but its root.
      wanted += re.findall(r"(?:to_apply|body)=%?([\w.\-]+)", line)
      made = re.match(
        r"\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]+)\]\S* ([\w\-]+)\(", line
      )
      if not made or math.prod(map(int, made[1].split(","))) != size:
        continue
      kind = made[2]
      if kind == "fusion":
        called = blocks[re.search(r"calls=%?([\w.\-]+)", line)[1]]
        root = next(one for one in called if one.lstrip().startswith("ROOT"))
        kind = re.search(r"\S+ ([\w\-]+)\(", root.split(" = ")[1])[1]
        # In place only where it writes into what came in as it was.
        if kind == "dynamic-update-slice" and "slice(%param" not in root:
          kind = "computed"
      if kind == "dynamic-update-slice":
        writes += 1
      elif kind not in ("parameter", "get-tuple-element", "bitcast"):
        others.append(line.strip())
  return writes, others


def lowered(function, params, batch=2, slots=320):
  where = loop.left_pad(PROMPTS[:batch], 64)
  knobs, features = sampling.knobs([GREEDY] * batch, stop_ids=[(0,)] * batch)
  generation = loop.prefill.eval_shape(
    params,
    *where,
    knobs,
    None,
    decoder=DECODER,
    slots=slots,
    features=features,
  )
  return function.lower(
    params, generation, knobs, decoder=DECODER, count=8, features=features
  ).compile()


def test_no_step_copies_a_cache(params):
  """One write in place for each layer's keys and values, and no more."""
  slots = 320
  size = 2 * NANO.num_kv_heads * NANO.head_dim * slots
  program = lowered(loop.decode, params, batch=2, slots=slots).as_text()
  writes, others = work_on_whole_caches(program, size)
  assert others == []
  assert writes == 2 * NANO.num_layers


def test_each_token_is_drawn_anew(params):
  """Where all words are as likely, thirty draws are not all the same."""
  flat = jax.tree.map(jax.numpy.zeros_like, params)
  (row,) = generate(flat, PROMPTS[:1], 30, config=WARM_ALL)
  assert len(set(row)) > 20
