"""transformers' Llama of one of our configs, for the peers of GPU benchmarks.

Runs in an environment of its own with torch and transformers.
"""

import contextlib

import gpu_weights


def device() -> str:
  import torch

  return "cuda" if torch.cuda.is_available() else "cpu"


def model(config, weights: bool, dtype: str = "float32"):
  """LlamaForCausalLM on the device.

  Args:
    config: model.config.LlamaConfig as a dict.
    weights: those of gpu_weights; else fresh ones.
    dtype: of its weights.
  """
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
  if scaling := config["rope_scaling"]:
    rope = rope | {
      "rope_type": scaling["kind"],
      "factor": scaling["factor"],
      "low_freq_factor": scaling["low_freq_factor"],
      "high_freq_factor": scaling["high_freq_factor"],
      "original_max_position_embeddings": scaling["original_context"],
    }
  theirs = LlamaConfig(
    vocab_size=config["vocab_size"],
    hidden_size=config["embed_dim"],
    intermediate_size=config["mlp_dim"],
    num_hidden_layers=config["num_layers"],
    num_attention_heads=config["num_heads"],
    num_key_value_heads=config["num_kv_heads"],
    head_dim=config["head_dim"],
    max_position_embeddings=config["context_length"],
    rms_norm_eps=config["norm_eps"],
    rope_parameters=rope,
    tie_word_embeddings=config["tied_embeddings"],
    attn_implementation="sdpa",
    use_cache=False,
  )
  # The frequencies of RoPE stay in float32, which a cast would not leave them.
  before = torch.get_default_dtype()
  torch.set_default_dtype(getattr(torch, dtype))
  try:
    with torch.device(device()):
      made = LlamaForCausalLM(theirs)
  finally:
    torch.set_default_dtype(before)
  if weights:
    with torch.no_grad():
      for path, shape in gpu_weights.shapes(config).items():
        values = torch.from_numpy(gpu_weights.weight(path, shape))
        if path.endswith("kernel"):
          values = values.T
        made.get_parameter(_name(path)).copy_(values)
  return made


def _name(path):
  """transformers' name of one of our paths."""
  whole = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
  }
  if path in whole:
    return whole[path]
  _, layer, rest = path.split(".", 2)
  inner = {
    "attention_norm.scale": "input_layernorm",
    "mlp_norm.scale": "post_attention_layernorm",
    "attention.query.kernel": "self_attn.q_proj",
    "attention.key.kernel": "self_attn.k_proj",
    "attention.value.kernel": "self_attn.v_proj",
    "attention.out.kernel": "self_attn.o_proj",
    "mlp.gate.kernel": "mlp.gate_proj",
    "mlp.up.kernel": "mlp.up_proj",
    "mlp.down.kernel": "mlp.down_proj",
  }[rest]
  return f"model.layers.{layer}.{inner}.weight"


def attention(name: str):
  """A context in which SDPA is torch's choice ("sdpa"), "cudnn" or "flash"."""
  from torch.nn.attention import SDPBackend, sdpa_kernel

  if name == "sdpa":
    return contextlib.nullcontext()
  chosen = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
  }
  return sdpa_kernel(chosen[name])
