"""The objective: a sum and a count, by its mask."""

import jax.numpy as jnp
import numpy as np

from llama_jax.objectives import next_token

BATCH = {
  "tokens": jnp.array([[5, 6, 7]]),
  "targets": jnp.array([[6, 7, 8]]),
  "positions": jnp.array([[0, 1, 0]]),
  "segments": jnp.array([[1, 1, 2]]),
  "loss_mask": jnp.array([[1.0, 0.0, 1.0]]),
  "sources": jnp.array([1]),
}


def toy_loss(params, ids, positions, segments, targets, weights):
  """Each argument counts with another power of ten, so none is exchanged."""
  each = ids + 100 * positions + 1000 * segments + 10000 * targets
  return params * jnp.sum(each * weights), each


def test_sum_and_count_by_hand():
  total, (count, sums) = next_token.make(toy_loss, 3)(2.0, BATCH)
  # Tokens 0 and 2: 5 + 1000 + 60000 and 7 + 2000 + 80000, times params.
  assert total == 2 * (61005 + 82007)
  assert count == 2
  # All of it is source 1's; what params weigh is not told.
  (losses, tokens), (same, none) = sums.values()
  assert none is None and same is tokens
  assert losses.tolist() == [0, 61005 + 82007, 0]
  assert tokens.tolist() == [0, 2, 0]


def test_parts_add_up_to_the_whole():
  objective = next_token.make(toy_loss, 2)
  parts = [
    objective(
      2.0,
      {
        name: a if name == "sources" else a[:, span]
        for name, a in BATCH.items()
      },
    )
    for span in (slice(0, 1), slice(1, 3))
  ]
  whole = objective(2.0, BATCH)
  np.testing.assert_allclose(sum(p[0] for p in parts), whole[0])
  np.testing.assert_allclose(sum(p[1][0] for p in parts), whole[1][0])


def test_frozen_is_ignored():
  objective = next_token.make(toy_loss, 2)
  assert objective(2.0, BATCH, {"teacher": 1})[0] == objective(2.0, BATCH)[0]
