"""Attention over pages against reference.py over the same keys in one piece.

The GPU kernel runs in jax's GPU interpret mode and is lowered for CUDA; in the
place of the TPU kernel stands the definition that jax ships with it, as its
program cannot be interpreted, and it is compiled for a TPU that is not there.
"""

import collections
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.kernels import paged, paged_pallas, paged_ragged, reference

HEADS = {"MHA": (2, 2), "GQA": (8, 2), "MQA": (4, 1)}
# Written into every slot at first: who looks where nothing was written, or at
# another row's page, is far off.
STALE = 3e3


def interpreter():
  try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
  except ImportError:  # Until jax 0.11 it is there but has no public name.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
  return InterpretGPUParams()


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
  """No kernel needs its device, and none is remembered to work."""
  monkeypatch.setattr(paged_pallas, "INTERPRET", interpreter())
  from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

  monkeypatch.setattr(
    ragged, "ragged_paged_attention", ragged.ref_ragged_paged_attention
  )
  paged._probe.cache_clear()


class Case(NamedTuple):
  q_BTNH: np.ndarray
  k_BSKH: np.ndarray
  v_BSKH: np.ndarray
  table_BX: np.ndarray
  lengths_B: np.ndarray
  q_pos_BT: np.ndarray
  q_seg_BT: np.ndarray


def make_case(lengths, T, heads, H, P, X, dtype, counts=None) -> Case:
  """Row b has counts[b] new tokens (T, or its length), then padding."""
  rng = np.random.default_rng(len(lengths) * T)
  N, K = HEADS[heads]
  B = len(lengths)
  lengths_B = np.array(lengths, np.int32)
  counts_B = np.minimum(T, lengths_B) if counts is None else np.array(counts)
  order_T = np.arange(T, dtype=np.int32)
  table_BX = np.zeros((B, X), np.int32)
  free = rng.permutation(np.arange(1, 1 + B * X))
  for b in range(B):
    used = -(-lengths[b] // P)
    table_BX[b, :used], free = free[:used], free[used:]

  def normal(*shape):
    # Rounded as the pool rounds, so that this is no part of a difference.
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float32)

  return Case(
    normal(B, T, N, H),
    normal(B, X * P, K, H),
    normal(B, X * P, K, H),
    table_BX,
    lengths_B,
    (lengths_B - counts_B)[:, None].astype(np.int32) + order_T,
    (order_T < counts_B[:, None]).astype(np.int32),
  )


def stale(kernel, case, P, dtype):
  K, H = case.k_BSKH.shape[2:]
  pool = paged.empty(kernel, 1 + case.table_BX.size, P, K, H, dtype)
  return jax.tree.map(lambda pages: jnp.full_like(pages, STALE), pool)


def fill(kernel, case, P, dtype):
  """All but the new tokens at once, then the new ones, padding to page 0."""
  pool = stale(kernel, case, P, dtype)
  B, S = case.k_BSKH.shape[:2]
  pos_BS = np.tile(np.arange(S), (B, 1))
  old_BS = pos_BS < case.q_pos_BT[:, :1]
  for pos, real in ((pos_BS, old_BS), (case.q_pos_BT, case.q_seg_BT != 0)):
    pos = np.minimum(np.maximum(pos, 0), S - 1)
    page = np.take_along_axis(case.table_BX, pos // P, 1)
    rows = np.arange(B)[:, None]
    pool = paged.write(
      pool,
      case.k_BSKH[rows, pos],
      case.v_BSKH[rows, pos],
      np.where(real, page, 0).astype(np.int32),
      (pos % P).astype(np.int32),
    )
  return pool


def check(kernel, case, P, dtype):
  pool = fill(kernel, case, P, dtype)
  # The TPU kernel's definition wants values.
  attend = paged.attend if kernel == "ragged" else jax.jit(paged.attend)
  out_BTNH = attend(
    jnp.asarray(case.q_BTNH, dtype),
    pool,
    jnp.asarray(case.table_BX),
    q_pos_BT=jnp.asarray(case.q_pos_BT),
    q_seg_BT=jnp.asarray(case.q_seg_BT),
    lengths_B=jnp.asarray(case.lengths_B),
  )
  out_BTNH = np.asarray(out_BTNH, np.float32)
  B, S = case.k_BSKH.shape[:2]
  pos_BS = np.tile(np.arange(S, dtype=np.int32), (B, 1))
  want_BTNH = reference.attend(
    case.q_BTNH,
    case.k_BSKH,
    case.v_BSKH,
    q_pos_BT=case.q_pos_BT,
    k_pos_BS=pos_BS,
    q_seg_BT=case.q_seg_BT,
    k_seg_BS=(pos_BS < case.lengths_B[:, None]).astype(np.int32),
  )
  real_BT = case.q_seg_BT != 0
  assert real_BT.any()
  np.testing.assert_allclose(
    out_BTNH[real_BT],
    np.asarray(want_BTNH)[real_BT],
    # bfloat16: weights and values of order 1 are rounded to 2^-9.
    atol=2e-6 if dtype == jnp.float32 else 2.0**-6,
  )
  assert np.isfinite(out_BTNH).all()


# Nothing; one token; a page but for one, whole, and one more; the whole table.
BORDERS = [0, 1, 15, 16, 17, 48]


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_equals_attention_in_one_piece(heads, T):
  case = make_case(BORDERS, T, heads, 8, 16, 3, jnp.float32)
  check("gather", case, 16, jnp.float32)


def test_bfloat16():
  case = make_case([5, 33], 4, "GQA", 8, 16, 3, jnp.bfloat16)
  check("gather", case, 16, jnp.bfloat16)


def test_the_tpu_kernel():
  case = make_case([16, 17], 4, "GQA", 8, 16, 3, jnp.float32)
  check("ragged", case, 16, jnp.float32)


# More pages than are fetched ahead; an odd number of shares, some of them
# empty; one page.
@pytest.mark.parametrize(
  "lengths, T, heads, H, P, X, programs",
  [
    ([0, 64, 330], 4, "GQA", 64, 64, 6, 1),
    ([1, 65, 190], 1, "MQA", 128, 64, 5, 9),
    ([127, 128], 1, "MHA", 64, 128, 1, 264),
  ],
)
def test_the_gpu_kernel(monkeypatch, lengths, T, heads, H, P, X, programs):
  monkeypatch.setattr(paged_pallas, "PROGRAMS", programs)
  case = make_case(lengths, T, heads, H, P, X, jnp.bfloat16)
  check("pallas", case, P, jnp.bfloat16)


def test_a_prefill_of_more_rows_than_the_gpu_kernel_has():
  case = make_case([100, 20], 20, "GQA", 64, 64, 2, jnp.bfloat16)
  check("pallas", case, 64, jnp.bfloat16)


@pytest.mark.parametrize("kernel", paged.KERNELS)
def test_padding_after_a_rows_tokens(kernel):
  """A draft of three for one row, none for the next, and an idle row."""
  P = 64
  case = make_case([66, 9, 0], 4, "MHA", 64, P, 2, jnp.bfloat16, [4, 1, 0])
  check(kernel, case, P, jnp.bfloat16)


@pytest.mark.parametrize("kernel", paged.KERNELS)
def test_gather_gives_back_what_was_written(kernel):
  P = 16
  case = make_case([48, 33], 1, "GQA", 8, P, 3, jnp.float32)
  K = case.k_BSKH.shape[2]
  pool = fill(kernel, case, P, jnp.float32)
  assert pool.page_size == P
  assert pool.pages[0].shape[paged.KV_HEADS_AXIS[kernel]] % K == 0
  k_nXHP, v_nSH = jax.jit(paged.gather)(pool, case.table_BX)
  k_nHS = np.moveaxis(k_nXHP, 1, 2).reshape(len(v_nSH), -1, v_nSH.shape[1])
  for b, length in enumerate(case.lengths_B):
    for k in range(K):
      ours = k_nHS[b * K + k, :, :length].T, v_nSH[b * K + k, :length]
      want = case.k_BSKH[b, :length, k], case.v_BSKH[b, :length, k]
      np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("kernel", paged.KERNELS)
def test_a_write_touches_its_slots_alone(kernel):
  P = 16
  case = make_case([48, 33], 1, "GQA", 8, P, 3, jnp.float32)
  before = fill(kernel, case, P, jnp.float32)
  K, H = case.k_BSKH.shape[2:]
  slots = np.array([[3, 3], [5, 1]]), np.array([[15, 2], [0, 7]])
  new_BTKH = np.full((2, 2, K, H), 7.0, np.float32)
  after = paged.write(before, new_BTKH, -new_BTKH, *slots)
  changed = sum(
    int((old != new).sum())
    for old, new in zip(before.pages, after.pages, strict=True)
  )
  assert changed == 2 * new_BTKH.size


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("kernel", paged.KERNELS)
def test_no_write_copies_a_pool(kernel, T):
  """In a loop, as decoding has it, each write is a scatter and no more.

  Any other instruction that makes an array as large as a pool's is a copy.
  """
  Z, P, K, H = 11, 16, 2, 8
  pool = paged.empty(kernel, Z, P, K, H, jnp.float32)

  def many(pool, k_BTKH, page_BT, offset_BT):
    def one(step, pool):
      return paged.write(pool, k_BTKH + step, k_BTKH, page_BT, offset_BT)

    return jax.lax.fori_loop(0, 3, one, pool)

  slots_BT = np.tile(np.arange(T, dtype=np.int32) % P, (2, 1))
  program = jax.jit(many, donate_argnums=0).lower(
    pool, np.zeros((2, T, K, H), np.float32), 1 + slots_BT % 10, slots_BT
  )
  text = program.compile().as_text()
  sizes = {math.prod(pages.shape) for pages in pool.pages}
  made = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w\-]+)\(", text)
  kinds = collections.Counter(
    kind
    for shape, kind in made
    if math.prod(map(int, shape.split(","))) in sizes
  )
  for name in ("parameter", "get-tuple-element", "bitcast"):
    del kinds[name]
  # On CPU each stands alone in a fusion.
  assert kinds["scatter"] == len(pool.pages)
  assert kinds.pop("fusion", 0) <= kinds.pop("scatter")
  assert not kinds
  assert "input_output_alias" in text


SIZES = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "page_size": 64}


def resolve(name, platform, dtype="bfloat16", **sizes):
  return paged.resolve(name, platform, dtype=dtype, **{**SIZES, **sizes})


def test_without_its_device_there_is_gather():
  assert resolve("auto", "cpu") == resolve("gather", "cpu") == "gather"
  for name in ("pallas", "ragged"):
    with pytest.raises(errors.ConfigError, match=r"cannot run here.*this is a"):
      resolve(name, "cpu")
  with pytest.raises(errors.ConfigError, match=r"'flash' is unknown.*gather"):
    resolve("flash", "cpu")


@pytest.mark.parametrize(
  "name, platform, dtype, sizes, said",
  [
    ("pallas", "gpu", "float32", {}, "float32"),
    ("pallas", "gpu", "bfloat16", {"head_dim": 80}, "head_dim of 64 or 128"),
    ("pallas", "gpu", "bfloat16", {"page_size": 16}, "64 or 128 tokens"),
    ("pallas", "gpu", "bfloat16", {"num_heads": 130}, "64 heads"),
    ("ragged", "tpu", "bfloat16", {}, "multiple of 128"),
    ("ragged", "tpu", "float16", {"head_dim": 128}, "float16"),
    (
      "ragged",
      "tpu",
      "bfloat16",
      {"head_dim": 128, "num_kv_heads": 3, "num_heads": 9},
      "3 kv heads",
    ),
  ],
)
def test_sizes_that_a_kernel_cannot_have(name, platform, dtype, sizes, said):
  with pytest.raises(errors.ConfigError, match=said):
    resolve(name, platform, dtype, **sizes)
  assert resolve("auto", platform, dtype, **sizes) == "gather"


def test_a_kernel_is_used_once_its_probe_has_passed(monkeypatch):
  def right(q_BTNH, keys, values, table_BX, first_B, lengths_B):
    T = q_BTNH.shape[1]
    q_pos_BT = first_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    keys = keys.swapaxes(2, 3)
    return paged.attend(
      q_BTNH,
      paged.Pool((keys, values), "gather"),
      table_BX,
      q_pos_BT=q_pos_BT,
      q_seg_BT=jnp.ones_like(q_pos_BT),
      lengths_B=lengths_B,
    )

  def wrong(q_BTNH, *rest):
    return right(q_BTNH * 1.2, *rest)

  def nan(q_BTNH, *rest):
    return right(q_BTNH, *rest) * jnp.nan

  def broken(*_):
    raise RuntimeError("no such instruction\nand much more")

  for attend, said in (
    (right, None),
    (wrong, "away from gather's values"),
    (nan, "nan away"),
    (broken, "RuntimeError: no such instruction;"),
  ):
    monkeypatch.setattr(paged_pallas, "attend", attend)
    paged._probe.cache_clear()
    if said is None:
      assert resolve("auto", "gpu") == resolve("pallas", "gpu") == "pallas"
      continue
    assert resolve("auto", "gpu") == "gather"
    with pytest.raises(errors.ConfigError, match=said):
      resolve("pallas", "gpu")


def shapes(kernel, B, T, N, K, H, P, X, sharding=None):
  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  pool = jax.eval_shape(lambda: paged.empty(kernel, 99, P, K, H, jnp.bfloat16))
  pool = jax.tree.map(lambda pages: array(pages.dtype, *pages.shape), pool)
  tokens = array(jnp.int32, B, T)
  return (
    (array(jnp.bfloat16, B, T, N, H), pool, array(jnp.int32, B, X)),
    {
      "q_pos_BT": tokens,
      "q_seg_BT": tokens,
      "lengths_B": array(jnp.int32, B),
    },
  )


@pytest.mark.parametrize("T, H, P", [(1, 64, 64), (4, 128, 128)])
def test_the_gpu_kernel_is_lowered_for_cuda(monkeypatch, T, H, P):
  """As far as it goes without a GPU: layouts and operands are accepted."""
  monkeypatch.setattr(paged_pallas, "INTERPRET", None)
  arrays, places = shapes("pallas", 8, T, 32, 8, H, P, 16)
  traced = jax.jit(paged.attend).trace(*arrays, **places)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text


@pytest.mark.slow
@pytest.mark.parametrize("T, N, K", [(1, 32, 8), (4, 16, 2), (4, 16, 1)])
def test_the_tpu_kernel_compiles_for_a_tpu(monkeypatch, tpu_topology, T, N, K):
  from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

  monkeypatch.setattr(
    ragged, "ragged_paged_attention", kernel.ragged_paged_attention
  )
  # Which the kernel would choose by the TPU that is there.
  blocks = {"num_kv_pages_per_block": 4, "num_queries_per_block": 8}
  monkeypatch.setattr(paged_ragged, "BLOCKS", blocks)
  mesh = jax.sharding.Mesh(
    np.array(tpu_topology.devices[:1]),
    ("all",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arrays, places = shapes("ragged", 8, T, N, K, 128, 64, 16, everywhere)
  assert paged_ragged.obstacle("tpu", "bfloat16", N, K, 128, 64) is None
  with jax.set_mesh(mesh):
    program = jax.jit(paged.attend).lower(*arrays, **places).compile()
  assert "ragged_paged_attention" in program.as_text()
