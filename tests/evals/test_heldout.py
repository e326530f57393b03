"""Held-out loss against plain logits, on any mesh, with one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import errors, evals, text
from llama_jax.checkpoint import names
from llama_jax.data import packing
from llama_jax.evals import heldout, perplexity
from llama_jax.evals import settings as settings_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.training import state as state_lib

NANO = sizes.get("nano")
DECODER = decoder_lib.Decoder(NANO)
T = 32


def packed(seed, count):
  """Rows of 2 T + 1 tokens, of documents shorter and longer than a row."""
  rng = np.random.default_rng(seed)
  documents = [
    packing.Document(rng.integers(512, size=size).tolist(), index)
    for index, size in enumerate(rng.integers(2, 100, size=2 * count + 4))
  ]
  return list(packing.pack(documents, 2 * T))[:count]


# One with fewer rows than a batch, one whose last batch is not full.
ROWS = {"books": packed(0, 3), "code": packed(1, 1)}


def domains(separate=True, count=9):
  return {
    name: heldout.cut(rows, count, T, separate) for name, rows in ROWS.items()
  }


@functools.partial(jax.jit, static_argnames="decoder")
def logits(params, ids, positions, segments, *, decoder):
  return decoder.apply({"params": params}, ids, positions, segments)[0]


def by_hand(params, pieces):
  """(sum of losses in float64, tokens), a piece at a time."""
  total, count = 0.0, 0
  for piece in pieces:
    out = logits(
      params,
      *(piece[key][None] for key in ("tokens", "positions", "segments")),
      decoder=DECODER,
    )
    out = np.float64(out[0])
    logprobs = out - np.log(np.exp(out).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(T), piece["targets"]]
    total -= (chosen * piece["loss_mask"]).sum()
    count += piece["loss_mask"].sum()
  return total, count


def test_rows_are_cut_into_all_their_pieces():
  pieces = heldout.cut(ROWS["books"], 2, T, True)
  assert len(pieces) == 4
  for index, row in enumerate(ROWS["books"][:2]):
    for half in (0, 1):
      want = packing.inputs(row, half * T, T, True)
      for key in want:
        np.testing.assert_array_equal(pieces[2 * index + half][key], want[key])
  assert len(heldout.cut(ROWS["code"], 9, 2 * T, True)) == 1


@pytest.mark.parametrize("separate", [True, False])
def test_loss_by_hand(random_params, separate):
  params = random_params(NANO)
  found = dict(heldout.evaluate(DECODER, params, domains(separate), 4))
  sums, counts = [], []
  for name, pieces in domains(separate).items():
    total, count = by_hand(params, pieces)
    assert found[f"heldout_tokens/{name}"] == count
    np.testing.assert_allclose(
      found[f"heldout_loss/{name}"], total / count, rtol=1e-5
    )
    sums.append(total)
    counts.append(count)
  np.testing.assert_allclose(
    found["heldout_loss"], sum(sums) / sum(counts), rtol=1e-5
  )
  assert list(found)[-1] == "heldout_loss"
  # The batch that pieces are put into changes nothing.
  again = dict(heldout.evaluate(DECODER, params, domains(separate), 8))
  for name, value in found.items():
    np.testing.assert_allclose(again[name], value, rtol=1e-6)


def test_one_program_and_the_same_bits(random_params):
  params = jax.tree.map(jnp.asarray, random_params(NANO))
  first = dict(heldout.evaluate(DECODER, params, domains(), 4))
  compiled = heldout._loss_sum._cache_size()
  # An equal decoder, as a resumed run has, and other rows.
  decoder = decoder_lib.Decoder(NANO)
  other = jax.tree.map(lambda leaf: 2 * leaf, params)
  changed = dict(heldout.evaluate(decoder, other, domains(count=1), 4))
  assert dict(heldout.evaluate(decoder, params, domains(), 4)) == first
  assert heldout._loss_sum._cache_size() == compiled
  assert changed["heldout_loss"] != first["heldout_loss"]


def test_no_rows_and_rows_without_a_target(random_params):
  params = random_params(NANO)
  assert dict(heldout.evaluate(DECODER, params, {}, 4)) == {}
  pieces = heldout.cut(ROWS["code"], 1, T, True)
  blank = [piece | {"loss_mask": 0 * piece["loss_mask"]} for piece in pieces]
  found = dict(heldout.evaluate(DECODER, params, {"code": blank}, 4))
  assert np.isnan(found["heldout_loss/code"])
  assert "heldout_loss" not in found


def config(**changes):
  fields = {"every": 5, "rows": 9, "tasks": (), "text": "", "window": 32}
  return settings_lib.EvaluationConfig(**fields | changes)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
  return text.load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, python_source):
  file = tmp_path_factory.mktemp("corpus") / "source.txt"
  file.write_text(python_source[0][:3000])
  return str(file)


@functools.cache
def on_mesh(data, fsdp, tensor, params_of, tokenizer, corpus):
  """What the loop's evaluation gives on a mesh, params lying as they train."""
  count = data * fsdp * tensor
  devices = mesh_lib.make(
    mesh_lib.ParallelConfig(data, fsdp, tensor), jax.devices()[:count]
  )
  with jax.set_mesh(devices):
    _, placed = state_lib.shardings(
      functools.partial(decoder_lib.init, DECODER), optax.identity(), devices
    )
    params = jax.device_put(params_of(NANO), placed.params)
    evaluate = evals.make(
      config(tasks=("perplexity",), text={"python": corpus}),
      DECODER,
      tokenizer,
      ROWS,
      devices,
      sequence_length=T,
      separate=True,
    )
    sharded = names.flatten(params)["layers/mlp/up/kernel"]
    parts = sharded.size // sharded.addressable_shards[0].data.size
    assert parts == fsdp * tensor
    return evaluate(params)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (4, 1, 1)], ids=str)
def test_a_mesh_equals_one_device(sizes, random_params, tokenizer, corpus):
  ours = on_mesh(*sizes, random_params, tokenizer, corpus)
  want = on_mesh(1, 1, 1, random_params, tokenizer, corpus)
  assert ours.keys() == want.keys()
  assert {"heldout_loss", "heldout_loss/code"} < ours.keys()
  assert "perplexity/python/mean_loss" in ours
  assert not any(name.endswith("documents") for name in ours)
  for name, value in want.items():
    np.testing.assert_allclose(ours[name], value, rtol=5e-6, err_msg=name)


def test_the_loops_perplexity_is_the_verbs(random_params, tokenizer, corpus):
  ours = on_mesh(1, 1, 1, random_params, tokenizer, corpus)
  with open(corpus) as file:
    want = perplexity.evaluate(
      DECODER,
      random_params(NANO),
      [file.read()],
      tokenizer,
      window=32,
      stride=32,
      bos=tokenizer.add_bos,
    )
  for name, value in want:
    if name != "documents":
      np.testing.assert_allclose(
        ours[f"perplexity/python/{name}"], value, rtol=1e-6
      )


def test_when_it_is_due():
  assert [s for s in range(1, 13) if config().due(s, 12)] == [5, 10, 12]
  assert not any(config(every=0).due(s, 12) for s in range(1, 13))


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"every": -1}, r"evaluation\.every=-1"),
    ({"rows": 0}, r"evaluation\.rows=0"),
    ({"window": 1}, r"evaluation\.window=1"),
    ({"tasks": ("perplexity",)}, r"evaluation\.text"),
    ({"text": "a.txt"}, r"evaluation\.tasks"),
  ],
)
def test_settings_are_checked(changes, said):
  with pytest.raises(errors.ConfigError, match=said):
    config(**changes)


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"tasks": ("chess",), "text": "here"}, r"evaluation\.tasks=chess.*perp"),
    ({"window": 512, "tasks": ("perplexity",)}, r"evaluation\.window=512"),
    (
      {"tasks": ("perplexity",), "text": {"a": "/none"}},
      r"evaluation\.text\.a=/none",
    ),
  ],
)
def test_mistakes_show_before_the_run(tokenizer, corpus, changes, said):
  devices = mesh_lib.make(mesh_lib.ParallelConfig(1, 1, 1), jax.devices()[:1])
  changes = {"text": corpus} | changes
  with pytest.raises(errors.UserError, match=said):
    evals.make(
      config(**changes),
      DECODER,
      tokenizer,
      ROWS,
      devices,
      sequence_length=T,
      separate=True,
    )
