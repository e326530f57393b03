"""Chunks of tokens: what is computed, where, and what devices must say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax.kernels import chunks, cross_entropy
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.parallel import rules

SIZE = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setitem(chunks.TOKENS, "cpu", SIZE)


def counted(scale, chunk):
  """How many chunks there were, and what can be told token by token."""
  x_CD, ids_C = chunk
  return jnp.ones(()), {"x": scale * x_CD, "ids": ids_C}


def make_rows(B, T):
  rng = np.random.default_rng(B + 10 * T)
  x = rng.normal(size=(B, T, 3)).astype(np.float32)
  return x, rng.integers(1, 100, size=(B, T))


@pytest.mark.parametrize("B, T", [(1, 1), (3, 5), (2, 16), (9, 4)])
def test_every_token_once(B, T):
  x, ids = make_rows(B, T)
  count, each = jax.jit(lambda x, ids: chunks.over(counted, 2.0, (x, ids)))(
    x, ids
  )
  assert count == -(-B * T // min(SIZE, B * T))
  np.testing.assert_array_equal(each["x"], 2 * x)
  np.testing.assert_array_equal(each["ids"], ids)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_only_what_is_wanted(share):
  """As few chunks as hold it; each token's own, back in its place."""
  x, ids = make_rows(4, 32)
  wanted = np.random.default_rng(0).random((4, 32)) < share
  count, each = jax.jit(
    lambda x, ids, wanted: chunks.over(counted, 2.0, (x, ids), wanted)
  )(x, ids, wanted)
  assert count == -(-wanted.sum() // SIZE)
  np.testing.assert_array_equal(each["x"], 2 * x * wanted[..., None])
  np.testing.assert_array_equal(each["ids"], ids * wanted)


def collectives(text: str) -> list[tuple[bool, str]]:
  """(whether in a loop, the line) of each collective of a program."""
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  found, entry = [], False
  for line in text.split("\n"):
    if line.endswith("{") and not line.startswith(" "):
      entry = line.startswith("ENTRY")
    if re.search(rf" ({kinds})(-start)?\(", line):
      found.append((not entry, line.strip()))
  return found


def bytes_of(line: str) -> int:
  """Of the float32 arrays that a collective gives."""
  shapes = re.findall(r"f32\[([\d,]*)\]", line.split(" all-")[0])
  return sum(
    4 * int(np.prod([int(n) for n in shape.split(",") if n]))
    for shape in shapes
  )


@pytest.mark.parametrize("sparse", [False, True], ids=["all", "sparse"])
@pytest.mark.parametrize(
  "axes",
  [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)],
  ids=["data", "fsdp", "all three", "tensor"],
)
def test_a_mesh_sums_the_heads_gradient_once(axes, sparse):
  """Not after every chunk: 2 GB of an 8B's, thousands of times a step."""
  B, T, D, V = 8, 32, 16, 512
  rng = np.random.default_rng(0)
  arrays = (
    rng.normal(size=(B, T, D)).astype(np.float32),
    rng.normal(size=(V, D)).astype(np.float32) / D**0.5,
    rng.integers(V, size=(B, T)),
    (rng.random((B, T)) < 0.4).astype(np.float32),
  )

  def loss(x, head, targets, weights):
    total, each = cross_entropy.loss_sum(
      x, head, targets, weights, True, 0.1, sparse
    )
    wanted = weights > 0 if sparse else None
    nll = cross_entropy.token_nll(x, head, targets, wanted, True)
    return total + jnp.sum(weights * nll**2), each * weights

  def grad():  # of its own each time: a mesh is no part of what jit compares
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

  want = grad()(*arrays)
  mesh = mesh_lib.make(mesh_lib.ParallelConfig(*axes))
  rows = rules.spec(("batch",))
  with jax.set_mesh(mesh):
    placed = [
      jax.device_put(array, NamedSharding(mesh, spec))
      for array, spec in zip(
        arrays, (rows, rules.spec(("vocab", "embed")), rows, rows), strict=True
      )
    ]
    program = grad().lower(*placed).compile()
    got = program(*placed)
  for one, other in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)

  tensor = axes[2]
  looped = [line for inside, line in collectives(program.as_text()) if inside]
  if tensor == 1:
    # But for one number that says how many chunks the fullest part has.
    assert not [line for line in looped if bytes_of(line)], looped
  else:
    # What a softmax over parts of the vocabulary takes, and a chunk's x.
    most = 4 * SIZE * max(D + 1, tensor)
    assert all(bytes_of(line) <= most for line in looped), looped


def test_parts_of_a_mesh_have_chunks_of_their_own():
  """Four tokens on each of eight devices are one chunk there, and not four."""
  x, ids = make_rows(8, 4)
  mesh = mesh_lib.make(mesh_lib.ParallelConfig(4, 2, 1))
  with jax.set_mesh(mesh):
    count, each = jax.jit(lambda *rows: chunks.over(counted, 1.0, rows))(x, ids)
    # Fewer rows than parts, as for a last batch: as without a mesh.
    other, _ = jax.jit(lambda *rows: chunks.over(counted, 1.0, rows))(
      x[:3], ids[:3]
    )
  assert count == 8 and other == 2
  np.testing.assert_array_equal(each["ids"], ids)
