"""Makes smollm2.json and smollm2.npz beside this file with transformers.

  PYTHONPATH=. python tests/golden/make_smollm2.py SmolLM2-135M-Instruct.GGUF

Ran with transformers 5.23.0 and torch 2.13.0 (CPU, float32). The ids are of
our tokenizer, which tests/text holds to its own golden file: the one that
transformers makes of a GGUF lacks SmolLM2's splitting of digits.

smollm2.json: text_ids, chat_ids, new_ids (64 greedy tokens after chat_ids).
smollm2.npz: nll float32 [T - 1], of each of text_ids but the first; words int
[W]; logits float32 [T, W] of these words.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

from llama_jax import text as text_lib
from llama_jax.text import chat

TEXT = """\
The old canal had been dug in 1794 to carry coal, and for sixty years it did \
little else. Forty boats a day went down to the sea, each drawn by one horse, \
and came back empty or with a little salt. When the railway opened, the price \
of a ton fell by half within a month, and the boats were tied up for good. \
Nobody drained the water. Reeds grew along the banks, then willows, and by the \
time the last lock-keeper retired there were herons on the gate and trout in \
the basin.

His daughter, who had learned to read from the tide tables, kept a record of \
the birds. She wrote the date, the weather and the number that she saw: "3 \
March, fog, eleven teal, two of them quarrelling." After thirty years she had \
filled nineteen notebooks. A student from the university asked to borrow them, \
typed every line into a computer, and found what she had always said was true: \
the teal came nine days earlier than they used to.

def first_arrivals(rows):
    \"\"\"Day of the year on which each kind of bird was first seen.\"\"\"
    first = {}
    for year, day, kind, count in rows:
        if count > 0 and day < first.get((year, kind), 366):
            first[year, kind] = day
    return first

Er zeigte ihr die Kurve. "So," she said, "it is a straight line." It was not \
quite straight; it bent upwards at the end, 0.31 days a year before 1990 and \
0.48 after. She looked at it for a long time, and then asked whether he would \
like to see the herons, because at this hour they came down to the third lock \
to fish, and one could stand quite close if one did not talk.
"""
MESSAGES = [
  {
    "role": "user",
    "content": "Explain in a few sentences why the sky is blue and sunsets"
    " are red.",
  }
]
WORDS = np.arange(0, 49152, 1024) + 17


def main(file):
  file = pathlib.Path(file).resolve()
  tokenizer = text_lib.load_tokenizer(file)
  text_ids = tokenizer.encode(TEXT)
  chat_ids = chat.render(tokenizer, MESSAGES).ids
  model = transformers.AutoModelForCausalLM.from_pretrained(
    str(file.parent), gguf_file=file.name, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    logits = model(torch.tensor([text_ids])).logits[0]
    nll = torch.nn.functional.cross_entropy(
      logits[:-1], torch.tensor(text_ids[1:]), reduction="none"
    )
    whole = model.generate(
      torch.tensor([chat_ids]),
      do_sample=False,
      max_new_tokens=64,
      repetition_penalty=1.0,
    )[0].tolist()
  assert len(whole) == len(chat_ids) + 64
  here = pathlib.Path(__file__).parent
  golden = {
    "text_ids": text_ids,
    "chat_ids": chat_ids,
    "new_ids": whole[len(chat_ids) :],
  }
  lines = [f"{json.dumps(name)}: {ids}" for name, ids in golden.items()]
  (here / "smollm2.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
  np.savez(
    here / "smollm2.npz",
    nll=nll.numpy(),
    words=WORDS,
    logits=logits[:, WORDS].numpy(),
  )
  print(len(text_ids), nll.mean().item(), tokenizer.decode(whole))


if __name__ == "__main__":
  main(sys.argv[1])
