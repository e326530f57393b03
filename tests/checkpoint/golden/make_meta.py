"""Makes the tiny checkpoints meta_one/, meta_two/ and torch/ beside this file.

  PYTHONPATH=... python tests/checkpoint/golden/make_meta.py

Ran with torch 2.13.0 (CPU), llama-models 0.3.0 and fairscale 0.4.13: Meta's
own Transformer, on one process and on two that talk through gloo, saved as
Meta saves. golden.npz holds ids [T] and float32 logits [T, V] of that code,
and the angles [H / 2] by which it turns at one far position. torch/ holds
tensors that are no plain arrays, and the same as torch prints them.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from fairscale.nn.model_parallel import initialize
from llama_models.llama3 import args as args_lib
from llama_models.llama3 import model as model_lib

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
  dim=32,
  n_layers=2,
  n_heads=4,
  n_kv_heads=2,
  vocab_size=48,
  multiple_of=16,
  ffn_dim_multiplier=0.5,
)
# folder -> params.json, number of files, dtype
MODELS = {
  "meta_one": (
    dict(SHAPE, norm_eps=1e-6, rope_theta=10000.0),
    1,
    torch.bfloat16,
  ),
  "meta_two": (
    dict(SHAPE, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
    2,
    torch.float32,
  ),
}
FAR = 9000


def run(rank, name):
  """Makes one file of a model, and with the others its logits."""
  params, width, dtype = MODELS[name]
  torch.distributed.init_process_group(
    "gloo", init_method="tcp://127.0.0.1:29517", rank=rank, world_size=width
  )
  initialize.initialize_model_parallel(width)
  torch.manual_seed(5)
  model = model_lib.Transformer(
    args_lib.ModelArgs(max_seq_len=FAR, max_batch_size=1, **params)
  )
  # Norms are the same in all files; the rest is each file's own.
  for key, value in model.state_dict().items():
    if "norm" in key:
      torch.nn.init.uniform_(value, 0.5, 1.5)
  torch.manual_seed(rank)
  for key, value in model.state_dict().items():
    if "norm" not in key:
      torch.nn.init.normal_(value, std=0.3)
  model = model.to(dtype)
  folder = HERE / name
  folder.mkdir(exist_ok=True)
  torch.save(model.state_dict(), folder / f"consolidated.{rank:02d}.pth")
  ids = torch.randint(
    SHAPE["vocab_size"], (1, 48), generator=torch.Generator().manual_seed(1)
  )
  logits = model.float()(ids, 0)[0].numpy()
  if rank == 0:
    angles = torch.angle(model.freqs_cis[FAR]).numpy()
    np.savez(
      folder / "golden.npz", ids=ids[0].numpy(), logits=logits, angles=angles
    )
    (folder / "params.json").write_text(json.dumps(params))


def make_views():
  folder = HERE / "torch"
  folder.mkdir(exist_ok=True)
  torch.manual_seed(0)
  base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
  module = torch.nn.Linear(4, 3, bias=False).to(torch.bfloat16)
  tensors = {
    "parameter": module.weight,
    "half": torch.rand(5).half(),
    "transposed": base.clone().t(),
    "columns": base.clone()[:, 2:5],
    "rows": base[2:4],
    "steps": base.clone()[1:3, ::2],
    "permuted": torch.rand(2, 3, 4).permute(2, 0, 1),
    "again": base,
  }
  for protocol in (2, 4):
    torch.save(
      tensors, folder / f"protocol{protocol}.pth", pickle_protocol=protocol
    )
  torch.save(module.state_dict(), folder / "state_dict.pth")
  torch.save(
    {"a": base}, folder / "old.pth", _use_new_zipfile_serialization=False
  )
  np.savez(
    folder / "golden.npz",
    **{key: value.detach().float().numpy() for key, value in tensors.items()},
  )


def main():
  make_views()
  for name, (_, width, _) in MODELS.items():
    torch.multiprocessing.spawn(run, (name,), nprocs=width)


if __name__ == "__main__":
  sys.exit(main())
