"""Writes smollm2_ids.json: what transformers makes of nasty texts and chats.

  python make_smollm2_ids.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers, torch and gguf, none of which the project uses. The ids come
from transformers' own reading of the GGUF file. Its conversion cuts text as
GPT-2 does and knows no "smollm"; the individual digits that SmolLM2's own
tokenizer.json asks for are set here.
"""

import json
import pathlib
import sys

import tokenizers
import transformers

TEXTS = [
  "",
  " ",
  "Hello world",
  "  two  spaces  ",
  "don't WE'LL I'm",
  "tabs\tand\r\nCRLF\n\n\nlines\n",
  "1234567890 and 3.14159, 1,000,000 or 20 2x4",
  "٣٤٥ ½ Ⅷ ² 一二三",
  "السلام عليكم ورحمة الله",
  "你好，世界。今天天气很好。",
  "👩‍👩‍👧‍👦 🇫🇷 🤷🏽‍♀️ ☃",
  "e\u0301 é \u00a0 \u200b \ufeff \u3000",
  "NUL \0 and \x01\x7f\x80",
  "def f(x):\n    return x ** 2  # 16\n",
  "<|im_end|> <|im_start|>system\n<|endoftext|><repo_name>",
  "\ue000\uf8ff\U0010ffff",
  "x" * 5000,
  "3" * 300,
]
CHATS = [
  [{"role": "user", "content": "Hi, what is 12 + 34?"}],
  [
    {"role": "system", "content": "You are terse.\n"},
    {"role": "user", "content": "  spaces  kept? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "\n\nΚαλά <b> 5 > 3 < 4 😀"},
  ],
]


def main(path):
  path = pathlib.Path(path)
  peer = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  pre = tokenizers.pre_tokenizers
  before = str(peer.backend_tokenizer.pre_tokenizer)
  peer.backend_tokenizer.pre_tokenizer = pre.Sequence(
    [
      pre.Digits(individual_digits=True),
      pre.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  texts = [
    {
      "text": text,
      "ids": peer.encode(
        text, add_special_tokens=False, split_special_tokens=True
      ),
    }
    for text in TEXTS
  ]
  chats = [
    {
      "messages": chat,
      "add_generation_prompt": prompt,
      "ids": list(
        peer.apply_chat_template(
          chat, add_generation_prompt=prompt, tokenize=True, return_dict=False
        )
      ),
    }
    for chat in CHATS
    for prompt in (True, False)
  ]
  made = {
    "transformers": transformers.__version__,
    "pre_tokenizer before": before,
    "texts": texts,
    "chats": chats,
  }
  target = pathlib.Path(__file__).with_name("smollm2_ids.json")
  target.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])
