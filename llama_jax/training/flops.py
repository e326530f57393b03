"""What a step must compute, and what a device could: the two parts of MFU.

Counted is what the model needs and not what a program does: every matrix
product forward and backward, causal attention at half of its square, the head
once, no look-up of embeddings, nothing for recomputation and nothing for the
optimizer (arXiv:2204.02311, appendix B, with attention halved).

L layers, D embed, N heads, K kv heads, H head dim, F mlp, V vocab.
"""

import jax
import numpy as np

from llama_jax.model import config as config_lib

# FLOP/s of one JAX device in dense bfloat16, by the start of its device_kind;
# the first that fits counts. NVIDIA's data sheets (H100, H200: 1,979 with
# sparsity, halved; B200: HGX) and Google's Cloud TPU pages. On v2 and v3 a
# device is one of a chip's two cores.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
  ("NVIDIA H100 PCIe", 756e12),
  ("NVIDIA H100 NVL", 835e12),
  ("NVIDIA H100", 989e12),
  ("NVIDIA H200", 989e12),
  ("NVIDIA GH200", 989e12),
  ("NVIDIA H800", 989e12),
  ("NVIDIA B200", 2250e12),
  ("NVIDIA GB200", 2500e12),
  ("NVIDIA A100", 312e12),
  ("NVIDIA A800", 312e12),
  ("NVIDIA L40S", 362e12),
  ("NVIDIA L4", 121e12),
  ("NVIDIA A10G", 70e12),
  ("TPU v6", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
  ("TPU v3", 61.5e12),
  ("TPU v2", 22.5e12),
)


def peak(mesh: jax.sharding.Mesh) -> float | None:
  """bfloat16 FLOP/s of all its devices; None where one is not known.

  MFU of training in FP8 is given over the same figure.
  """
  rates = [_rate(device.device_kind) for device in mesh.devices.flat]
  return None if None in rates else sum(rates)


def _rate(device_kind: str) -> float | None:
  for start, rate in PEAK_FLOPS:
    if device_kind.startswith(start):
      return rate
  return None


def matmul_weights(config: config_lib.LlamaConfig) -> int:
  """Weights that a token is multiplied with; a tied head is one of them."""
  D, N, K = config.embed_dim, config.num_heads, config.num_kv_heads
  attention = 2 * D * config.head_dim * (N + K)
  layer = attention + 3 * D * config.mlp_dim
  rows = config.vocab_size if config.head == "words" else 1
  return config.num_layers * layer + D * rows


def per_token(
  config: config_lib.LlamaConfig,
  attention_length: float,
  *,
  frozen: bool = False,
) -> float:
  """FLOPs of training on one token: 6 N_mm + 6 L S N H.

  Args:
    config: the model.
    attention_length: S, tokens of a row; of packed rows attention_length().
    frozen: its weights take no gradient, as LoRA's base: 4 N_mm. What adapters
      need is not counted.
  """
  width = config.num_heads * config.head_dim
  attention = 6 * config.num_layers * attention_length * width
  return (4 if frozen else 6) * matmul_weights(config) + attention


def attention_length(segments: np.ndarray) -> float:
  """Sum of length^2 over sum of length of all documents' parts in the rows.

  Args:
    segments: int [..., T]; 0 is padding, and a segment is one run of its id.
  """
  rows = np.asarray(segments).reshape(-1, np.shape(segments)[-1])
  edge = np.ones((len(rows), 1), bool)
  opens = np.concatenate([edge, rows[:, 1:] != rows[:, :-1]], axis=1).ravel()
  starts = np.flatnonzero(opens)
  lengths = np.diff(np.append(starts, rows.size))
  lengths = lengths[rows.ravel()[starts] != 0].astype(np.float64)
  return float((lengths**2).sum() / max(lengths.sum(), 1))


def of_batch(config: config_lib.LlamaConfig, segments: np.ndarray) -> float:
  """FLOPs of a step on these rows, int [..., T]; padding counts nothing."""
  tokens = int(np.count_nonzero(segments))
  return tokens * per_token(config, attention_length(segments))
