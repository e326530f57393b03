"""Keys and values in pages, and attention of new tokens over them.

A pool holds one layer's pages, P tokens each; a sequence is a list of page
numbers in order, so that its positions 0, 1, 2, ... lie in slot `position % P`
of page `table[position // P]`. Page 0 belongs to no sequence: padding is
written there, and a page list is filled up with it.

How a pool lies in memory is its kernel's affair:

  gather   keys [Z, K, H, P], values [Z, K, P, H]: a row's pages are copied
           together into the layout of cached.py. The definition; runs anywhere.
  pallas   both [Z, K, P, H]: ours, for NVIDIA Hopper (paged_pallas.py).
  ragged   [Z, P, 2K, H], a key and its value in turn: JAX's own kernel for TPU
           (paged_ragged.py).

B batch, T new tokens, N heads, K kv heads, H head dim, Z pages of a pool, X
pages of a row, P tokens of a page; S = X * P, n = B * K.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import errors
from llama_jax.kernels import cached, paged_pallas, paged_ragged

KERNELS = ("gather", "pallas", "ragged")
_OBSTACLES = {
  "pallas": paged_pallas.obstacle,
  "ragged": paged_ragged.obstacle,
}
AUTO = "auto"
# Of which a program is one device's, so that a mesh needs a shard_map.
PER_DEVICE = ("pallas", "ragged")
# Where the kv heads lie, for sharding: in a fused axis each with its value.
KV_HEADS_AXIS = {"gather": 1, "pallas": 1, "ragged": 2}


@flax.struct.dataclass
class Pool:
  """One layer's pages.

  Attributes:
    pages: keys and values, or both in one array, as `kernel` wants them.
    kernel: a key of KERNELS.
  """

  pages: tuple[jax.Array, ...]
  kernel: str = flax.struct.field(pytree_node=False)

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    axis = {"gather": 3, "pallas": 2, "ragged": 1}[self.kernel]
    return self.pages[0].shape[axis]


def empty(
  kernel: str,
  pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype,
) -> Pool:
  """A pool of zeros; what no one wrote is finite, which masking needs."""
  Z, P, K, H = pages, page_size, num_kv_heads, head_dim
  shapes = {
    "gather": ((Z, K, H, P), (Z, K, P, H)),
    "pallas": ((Z, K, P, H), (Z, K, P, H)),
    "ragged": ((Z, P, 2 * K, H),),
  }[kernel]
  return Pool(tuple(jnp.zeros(shape, dtype) for shape in shapes), kernel)


def write(pool: Pool, k_BTKH, v_BTKH, page_BT, offset_BT) -> Pool:
  """Puts tokens into slots, in place where the pool is donated or carried.

  Several tokens may go to one slot of page 0, and to no other slot.
  """
  # Out of range cannot be, and promising it saves a clamp an index.
  options = {"mode": "promise_in_bounds"}
  if pool.kernel == "ragged":
    (fused,) = pool.pages
    B, T, K, H = k_BTKH.shape
    new = jnp.stack([k_BTKH, v_BTKH], 3).reshape(B, T, 2 * K, H)
    new = new.astype(fused.dtype)
    return pool.replace(
      pages=(fused.at[page_BT, offset_BT].set(new, **options),)
    )
  keys, values = pool.pages
  k_BTKH, v_BTKH = k_BTKH.astype(keys.dtype), v_BTKH.astype(values.dtype)
  if pool.kernel == "gather":
    keys = keys.at[page_BT, :, :, offset_BT].set(k_BTKH, **options)
  else:
    keys = keys.at[page_BT, :, offset_BT].set(k_BTKH, **options)
  values = values.at[page_BT, :, offset_BT].set(v_BTKH, **options)
  return pool.replace(pages=(keys, values))


def gather(pool: Pool, table_BX) -> tuple[jax.Array, jax.Array]:
  """Rows' pages side by side, in the layout of cached.py: each is a panel."""
  B, X = table_BX.shape
  found = [
    pages.at[table_BX].get(mode="promise_in_bounds") for pages in pool.pages
  ]
  if pool.kernel == "ragged":
    P, H = pool.page_size, pool.pages[0].shape[3]
    pairs_BXPK2H = found[0].reshape(B, X, P, -1, 2, H)
    k_BKXHP = pairs_BXPK2H[..., 0, :].transpose(0, 3, 1, 4, 2)
    v_BKXPH = pairs_BXPK2H[..., 1, :].transpose(0, 3, 1, 2, 4)
  else:
    k_BKXHP, v_BKXPH = (pages.swapaxes(1, 2) for pages in found)
    if pool.kernel == "pallas":
      k_BKXHP = k_BKXHP.swapaxes(3, 4)
  K, H, P = k_BKXHP.shape[1], *k_BKXHP.shape[3:]
  return (
    k_BKXHP.reshape(B * K, X, H, P),
    v_BKXPH.reshape(B * K, X * P, H),
  )


def attend(
  q_BTNH, pool: Pool, table_BX, *, q_pos_BT, q_seg_BT, lengths_B
) -> jax.Array:
  """T new tokens of each row, already written, over the row's pages.

  A token sees the keys at positions up to its own. The tokens of a row are the
  last of its length, in order, with padding (segment 0) after them or none;
  what stands in padding is finite and otherwise the kernel's own affair.

  Args:
    q_BTNH: queries, not yet scaled.
    table_BX: page numbers; those from ceil(length / P) on are not looked at.
    q_pos_BT: position of each query in its sequence.
    q_seg_BT: 0 for padding, 1 for a token.
    lengths_B: tokens of each row in its pages, the new ones among them; 0 for
      a row that is all padding.

  Returns:
    [B, T, N, H] of q's dtype.
  """
  if pool.kernel == "ragged":
    count_B = jnp.sum(q_seg_BT != 0, axis=1)
    return paged_ragged.attend(
      q_BTNH, *pool.pages, table_BX, lengths_B, count_B
    )
  # A prefill is more rows, and work enough to pay for the copy.
  if pool.kernel == "pallas" and paged_pallas.fits(q_BTNH, pool.pages[0]):
    return paged_pallas.attend(
      q_BTNH, *pool.pages, table_BX, q_pos_BT[:, 0], lengths_B
    )
  k_nXHP, v_nSH = gather(pool, table_BX)
  pos_S = jnp.arange(v_nSH.shape[1], dtype=q_pos_BT.dtype)
  pos_BS = jnp.broadcast_to(pos_S, (len(table_BX), len(pos_S)))
  return cached.attend(
    q_BTNH,
    k_nXHP.astype(q_BTNH.dtype),
    v_nSH.astype(q_BTNH.dtype),
    q_pos_BT=q_pos_BT,
    k_pos_BS=pos_BS,
    q_seg_BT=q_seg_BT,
    k_seg_BS=(pos_BS < lengths_B[:, None]).astype(q_seg_BT.dtype),
  )


def resolve(
  name: str,
  platform: str,
  *,
  dtype,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  page_size: int,
) -> str:
  """A key of KERNELS for "auto" or a named kernel that works here.

  A kernel works where nothing stands against it and a small case gives what
  gather gives, on the first device. To be called outside jit and any mesh.

  Args:
    platform: as kernels.platform() says it.
    dtype: of the pool.
    num_heads, num_kv_heads: of one device.

  Raises ConfigError where a named kernel does not.
  """
  if name not in (AUTO, *KERNELS):
    raise errors.ConfigError(
      f"attention={name!r} is unknown;"
      f" use {AUTO} or one of {', '.join(KERNELS)}."
    )
  sizes = (num_heads, num_kv_heads, head_dim, page_size)
  dtype = jnp.dtype(dtype)
  for kernel in _OBSTACLES if name == AUTO else (name,):
    if kernel == "gather":
      break
    found = _OBSTACLES[kernel](platform, dtype, *sizes) or _probe(
      kernel, dtype, *sizes
    )
    if found is None:
      return kernel
    if name != AUTO:
      raise errors.ConfigError(
        f"attention={name!r} cannot run here: {found}; use {AUTO} or gather."
      )
  return "gather"


# Of values of order 1 in bfloat16, whose last bit is 2^-8.
PROBE_TOLERANCE = 2.0**-5


@functools.cache
def _probe(kernel, dtype, num_heads, num_kv_heads, head_dim, page_size):
  """What goes wrong in a small case on this device, or None."""
  rng = np.random.default_rng(0)
  lengths_B = np.array([1, page_size, 3 * page_size - 2], np.int32)
  B, X = len(lengths_B), 3
  table_BX = 1 + rng.permutation(B * X).reshape(B, X).astype(np.int32)
  pos_BS = np.tile(np.arange(X * page_size, dtype=np.int32), (B, 1))
  page_BS = np.where(
    pos_BS < lengths_B[:, None], table_BX.repeat(page_size, axis=1), 0
  )

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  k_BSKH, v_BSKH = (
    normal(*pos_BS.shape, num_kv_heads, head_dim) for _ in range(2)
  )

  def run(kernel, q_BTNH, **where):
    pool = empty(kernel, 1 + B * X, page_size, num_kv_heads, head_dim, dtype)
    pool = write(pool, k_BSKH, v_BSKH, page_BS, pos_BS % page_size)
    return attend(q_BTNH, pool, table_BX, lengths_B=lengths_B, **where)

  for T in (1, 4):
    first_B = np.maximum(lengths_B - T, 0)
    q_pos_BT = first_B[:, None] + np.arange(T, dtype=np.int32)
    real_BT = q_pos_BT < lengths_B[:, None]
    where = {"q_pos_BT": q_pos_BT, "q_seg_BT": real_BT.astype(np.int32)}
    q_BTNH = normal(B, T, num_heads, head_dim)
    try:
      ours, want = (
        np.asarray(
          jax.jit(functools.partial(run, one))(q_BTNH, **where), np.float32
        )
        for one in (kernel, "gather")
      )
    # Compilers raise what they like; it is told and the kernel is not used.
    except Exception as error:
      first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
      return f"its probe failed with {type(error).__name__}: {first}"
    worst = np.abs(ours - want)[real_BT].max()
    # Written so that NaN is wrong too.
    if not worst <= PROBE_TOLERANCE:
      return f"its probe was {worst:.2g} away from gather's values"
  return None
