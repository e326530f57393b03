"""Makes distill.npz beside this file: plain torch on transformers' Llamas.

  python tests/golden/make_distill.py

Ran with transformers 5.23.0 and torch 2.13.0 (CPU), float32. Student and
teacher differ in width, heads, layers and in whether the head is tied, and
share a vocabulary. Of three rows, one whole, one padded on the left and one on
the right:

  student, teacher: JSON of config.json; student/NAME, teacher/NAME: weights
  ids, mask, positions [3, T]; scored [3, T - 1], 1 where the next token counts
  CASE/mixture: weights of data, forward and reverse, temperature, stored words
    (0: a live teacher)
  CASE/loss: the sum over scored tokens; CASE/nll, CASE/forward [3, T - 1]
  CASE/gradients/NAME: of the sum, by the student's weights
"""

import json
import pathlib

import numpy as np
import torch
import transformers

T, V = 12, 20
SHARED = dict(
  vocab_size=V,
  initializer_range=0.3,
  rms_norm_eps=1e-5,
  max_position_embeddings=64,
  rope_parameters={"rope_type": "default", "rope_theta": 1e4},
  attn_implementation="eager",
)
MODELS = {
  "student": dict(
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
  ),
  "teacher": dict(
    hidden_size=20,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=10,
    tie_word_embeddings=False,
  ),
}
# data, forward, reverse, temperature, stored words.
CASES = {
  "forward": (0.0, 1.0, 0.0, 1.0, 0),
  "reverse": (0.0, 0.0, 1.0, 1.0, 0),
  "mixture": (0.5, 0.3, 0.7, 2.5, 0),
  "stored": (0.5, 1.0, 0.0, 2.0, 4),
}


def divergence(log_a, log_b):
  """KL(a || b) of the last axis."""
  return torch.nn.functional.kl_div(
    log_b, log_a, reduction="none", log_target=True
  ).sum(-1)


def coarsened(logprobs, ids):
  """The words of ids, and all others as one more."""
  known = torch.gather(logprobs, -1, ids)
  others = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
  return torch.cat([known, others], -1)


def losses(logits, teacher_logits, targets, case):
  """Of each token: the loss, its negative log-likelihood, its KL(p || q)."""
  data, forward, reverse, t, stored = case
  nll = torch.nn.functional.cross_entropy(
    logits.transpose(1, 2), targets, reduction="none"
  )
  log_p = (teacher_logits / t).log_softmax(-1)
  log_q = (logits / t).log_softmax(-1)
  if stored:
    ids = log_p.topk(stored).indices
    log_p, log_q = coarsened(log_p, ids), coarsened(log_q, ids)
  forward_kl, reverse_kl = divergence(log_p, log_q), divergence(log_q, log_p)
  mixed = forward * forward_kl + reverse * reverse_kl
  return data * nll + t * t * mixed, nll, forward_kl


def main():
  torch.manual_seed(0)
  arrays, models = {}, {}
  for kind, fields in MODELS.items():
    config = transformers.LlamaConfig(**SHARED, **fields)
    models[kind] = model = transformers.LlamaForCausalLM(config)
    arrays[kind] = json.dumps(config.to_dict())
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
      arrays[f"{kind}/{name}"] = parameter.detach().numpy().copy()
  mask = torch.ones(3, T, dtype=torch.long)
  mask[1, :4] = 0
  mask[2, -3:] = 0
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  ids = torch.randint(V, (3, T)) * mask
  scored = mask[:, 1:] * mask[:, :-1]
  # A prompt that is not trained.
  scored[0, :3] = 0
  arrays |= {
    name: value.numpy()
    for name, value in dict(
      ids=ids, mask=mask, positions=positions, scored=scored
    ).items()
  }

  def logits_of(model):
    out = model(ids, attention_mask=mask, position_ids=positions)
    return out.logits[:, :-1]

  with torch.no_grad():
    teacher_logits = logits_of(models["teacher"])
  student = models["student"]
  for name, case in CASES.items():
    student.zero_grad()
    loss, nll, forward_kl = losses(
      logits_of(student), teacher_logits, ids[:, 1:], case
    )
    total = loss[scored.bool()].sum()
    total.backward()
    arrays[f"{name}/mixture"] = np.array(case)
    arrays[f"{name}/loss"] = total.detach().numpy()
    arrays[f"{name}/nll"] = nll.detach().numpy()
    arrays[f"{name}/forward"] = forward_kl.detach().numpy()
    for key, parameter in student.named_parameters():
      arrays[f"{name}/gradients/{key}"] = parameter.grad.numpy().copy()
    print(name, total.item())
  np.savez_compressed(pathlib.Path(__file__).parent / "distill.npz", **arrays)


if __name__ == "__main__":
  main()
