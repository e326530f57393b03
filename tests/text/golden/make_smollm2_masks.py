"""Writes smollm2_masks.json: what transformers says the assistant said.

  python make_smollm2_masks.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers, torch and gguf (ran with 5.23). It marks tokens in templates
with {% generation %} blocks only. It forgets the last tokens of an answer whose
last letter is several of them, so none here ends so. The tokenizer is that of
make_smollm2_ids.py.
"""

import json
import pathlib
import sys

import tokenizers
import transformers

# ChatML, with the end of the turn in the block and without.
_START = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  "{% if m.role == 'assistant' %}"
)
_END = (
  "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = [
  _START
  + "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
  + "{{ '\n' }}"
  + _END,
  _START
  + "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
  + _END,
  # No special token between header and answer: tokens straddle.
  "{% for m in messages %}{% if m.role == 'assistant' %}"
  "Answer: {% generation %}{{ m.content }}{% endgeneration %}. "
  "{% else %}Question: {{ m.content }} {% endif %}{% endfor %}",
]
CHATS = [
  [
    {"role": "user", "content": "Hi, what is 12 + 34?"},
    {"role": "assistant", "content": "It is 46."},
  ],
  [
    {"role": "system", "content": "You are terse.\n"},
    {"role": "user", "content": "  spaces  kept? "},
    {"role": "assistant", "content": " Yes,\n they are.\n\n"},
    {"role": "user", "content": "\n\nΚαλά <b> 5 > 3 < 4 😀"},
    {"role": "assistant", "content": "😀👩‍👩‍👧‍👦 你好."},
  ],
]


def main(path):
  path = pathlib.Path(path)
  peer = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  pre = tokenizers.pre_tokenizers
  peer.backend_tokenizer.pre_tokenizer = pre.Sequence(
    [
      pre.Digits(individual_digits=True),
      pre.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  rows = []
  for template in TEMPLATES:
    for chat in CHATS:
      out = peer.apply_chat_template(
        chat,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
      )
      rows.append(
        {
          "template": template,
          "messages": chat,
          "ids": list(out["input_ids"]),
          "assistant": list(out["assistant_masks"]),
        }
      )
  out = pathlib.Path(__file__).with_name("smollm2_masks.json")
  out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])
