"""What we export, in the hands of those who asked for it.

transformers lives in an environment of its own (benchmarks/README.md says how
to make one): PEER_PYTHON=ENV/bin/python pytest -m slow. llama.cpp has its test
in test_gguf_write.py.
"""

import json
import os
import subprocess

import numpy as np
import pytest

from llama_jax import convert
from llama_jax import llama as llama_lib
from llama_jax.checkpoint import proof

THEIRS = """
import json, sys, torch, transformers
torch.manual_seed(0)
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(
  folder, dtype=torch.float32
).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
  loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
chat = tokenizer.apply_chat_template(
  [{"role": "user", "content": "Name three colours."}],
  add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
new = model.generate(**chat, max_new_tokens=16, do_sample=False)
print(json.dumps({
  "loss": loss,
  "text": tokenizer.decode(ids),
  "chat": chat["input_ids"][0].tolist(),
  "answer": new[0, chat["input_ids"].shape[1]:].tolist(),
  "stops": model.generation_config.eos_token_id,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  "PEER_PYTHON" not in os.environ, reason="needs a Python with transformers"
)
def test_transformers_runs_the_folder(smollm2, tmp_path):
  """GGUF -> orbax -> hf in shards -> transformers: loss and greedy answer."""
  for source, destination, settings in (
    (f"gguf:{smollm2}", f"orbax:{tmp_path}/o", {}),
    (f"orbax:{tmp_path}/o", f"hf:{tmp_path}/h", {"shard_gb": 0.2}),
  ):
    convert.convert(convert.Job(source, destination, **settings), check=True)
  llama = llama_lib.load(f"orbax:{tmp_path}/o")
  ids = llama.tokenizer.encode(proof.TEXT)
  done = subprocess.run(
    [os.environ["PEER_PYTHON"], "-c", THEIRS, tmp_path / "h", json.dumps(ids)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  theirs = json.loads(done.stdout.splitlines()[-1])
  ours = proof.mean_loss(np.asarray(llama.logits([ids]))[0], ids)
  assert abs(theirs["loss"] - ours) < 1e-4
  assert theirs["text"] == proof.TEXT
  messages = [{"role": "user", "content": "Name three colours."}]
  assert theirs["chat"] == llama.encode_chat(messages)
  text = "".join(
    llama.stream(
      theirs["chat"],
      max_new_tokens=16,
      sampling_config=llama_lib.sampling.SamplingConfig(
        temperature=0.0, top_k=0, top_p=1.0, seed=0
      ),
    )
  )
  stops = set(llama.tokenizer.stop_ids)
  answer = [i for i in theirs["answer"] if i not in stops]
  assert llama.tokenizer.decode(answer) == text
  assert set(theirs["stops"]) == stops
