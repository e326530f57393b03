"""The verb: filling the hole in a file, why an answer ended, a mesh."""

import json
import shutil

import pytest

from llama_jax import errors, generate
from llama_jax import llama as llama_lib
from llama_jax import text as text_lib
from llama_jax.decoding import loop, sampling

_NAMES = ["<PRE>", "<SUF>", "<MID>", "<EOT>"]


@pytest.fixture(scope="module")
def model(nano, tmp_path_factory):
  """The nano model with the tokens for infilling, at ids it has rows for."""
  folder = tmp_path_factory.mktemp("infill") / "model"
  shutil.copytree(nano, folder)
  file = folder / "tokenizer.json"
  spec = json.loads(file.read_text())
  first = len(spec["model"]["vocab"])
  spec["added_tokens"] += [
    {**spec["added_tokens"][0], "id": first + i, "content": name}
    for i, name in enumerate(_NAMES)
  ]
  file.write_text(json.dumps(spec))
  return folder


class _Told:
  """A model that says what it was told to."""

  def __init__(self, tokenizer, says, reason="stop"):
    self._tokenizer = tokenizer
    self._says, self._reason = says, reason

  def need_tokenizer(self):
    return self._tokenizer

  def stream(self, prompt, **settings):
    self.prompt, self.settings = prompt, settings
    yield from self._says
    return self._reason


def test_the_whole_text_is_printed(model, capsys, tmp_path):
  tokenizer = text_lib.load_tokenizer(model)
  file = tmp_path / "holed.py"
  file.write_bytes("é\r\ndef f():\n<FILL>\n  end".encode())
  around = generate.around_hole(str(file), "<FILL>")
  assert around == ("é\r\ndef f():\n", "\n  end")
  told = _Told(tokenizer, ["  ret", "urn 1"])
  generate.fill(told, *around, {"max_new_tokens": 3})
  assert capsys.readouterr().out == "é\r\ndef f():\n  return 1\n  end"
  pre, suf, mid, end = (tokenizer.special_tokens[name] for name in _NAMES)
  encode = tokenizer.encode
  assert told.prompt == [
    *[tokenizer.bos_id] * tokenizer.add_bos,
    *[pre, *encode(around[0]), suf, *encode(around[1]), mid],
  ]
  assert told.settings == {
    "stop_ids": (end, *tokenizer.stop_ids),
    "continues": True,
    "max_new_tokens": 3,
  }
  generate.fill(_Told(tokenizer, []), *around, {})
  assert capsys.readouterr().out == "".join(around)


def test_a_cut_answer_is_told_of(model, capsys):
  tokenizer = text_lib.load_tokenizer(model)
  for says, reason, told in (
    (["x"], "length", "note: --max_new_tokens=3 cut what fills the hole"),
    ([], "length", "note: --max_new_tokens=3 cut what fills the hole"),
    (["x"], "stop", ""),
  ):
    llama = _Told(tokenizer, says, reason)
    generate.fill(llama, "a", "b", {"max_new_tokens": 3})
    out, err = capsys.readouterr()
    assert out == "".join(["a", *says, "b"])
    assert told in err and bool(told) == bool(err)


def test_why_an_answer_ended(nano):
  llama = llama_lib.load(f"hf:{nano}")
  prompt = llama.encode_prompt("def f(")

  def read(new, **settings):
    pieces = llama.stream(
      prompt,
      max_new_tokens=new,
      sampling_config=sampling.SamplingConfig(),
      **settings,
    )
    text = ""
    while True:
      try:
        text += next(pieces)
      except StopIteration as end:
        return text, end.value

  text, reason = read(9, stop_ids=[])
  assert text and reason == "length"
  _, reason = read(9, stop_ids=[], stop=[text[0]])
  assert reason == "stop"
  decoder, params = llama.unrolled
  (tokens,) = loop.generate(
    decoder,
    params,
    [prompt],
    max_new_tokens=9,
    sampling_config=sampling.SamplingConfig(),
    stop_ids=[],
  )
  # As the last that was allowed, and one too late.
  place = tokens.index(tokens[-1])
  assert read(place + 1, stop_ids=tokens[-1:])[1] == "stop"
  assert place == 0 or read(place, stop_ids=tokens[-1:])[1] == "length"


@pytest.mark.parametrize(
  "content, hole, words",
  [
    (b"no mark", "<FILL>", "<FILL> 0 times"),
    (b"<FILL> and <FILL>", "<FILL>", "<FILL> 2 times"),
    (b"text", "", "--hole is empty"),
    (b"\xff<FILL>", "<FILL>", "is not UTF-8"),
    (None, "<FILL>", "cannot read"),
  ],
)
def test_a_file_without_one_hole_is_refused(tmp_path, content, hole, words):
  file = tmp_path / "file"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(errors.UserError, match=words):
    generate.around_hole(str(file), hole)


def test_the_verb_fills_and_refuses(run_verbs, model, nano, tmp_path):
  file = tmp_path / "holed.py"
  file.write_text("def f(x):\n  @@\n# end\n")
  rest = ["--hole=@@", "--max_new_tokens=8", f"--infill={file}"]
  filled, plain, both, absent = run_verbs(
    ["llama_jax.generate", f"--ckpt=hf:{model}", *rest],
    ["llama_jax.generate", f"--ckpt=hf:{nano}", *rest],
    ["llama_jax.generate", f"--ckpt=hf:{model}", *rest, "--prompt=x"],
    ["llama_jax.generate", f"--ckpt=hf:{model}", f"--infill={file}"],
  )
  code, out, err = filled
  assert code == 0, err
  assert out.startswith("def f(x):\n  ") and out.endswith("\n# end\n")
  assert err == "note: --max_new_tokens=8 cut what fills the hole; give more.\n"
  for (code, out, err), words in [
    (plain, "no tokens for infilling"),
    (both, "give one of --prompt=TEXT, --chat, --infill=FILE or"),
    (absent, "<FILL> 0 times"),
  ]:
    assert code == 2 and not out, (code, out)
    assert words in err and err.count("\n") == 1, err


def test_flags_of_another_mode_are_refused(run_verbs, nano, tmp_path):
  """Before the weights are read: they would do nothing."""
  prompts = tmp_path / "in.jsonl"
  prompts.write_text('{"prompt": "x"}\n')
  speak = ["llama_jax.generate", f"--ckpt=hf:{nano}", "--prompt=x"]
  answer = ["llama_jax.generate", f"--ckpt=hf:{nano}", f"--prompts={prompts}"]
  for (code, out, err), words in zip(
    run_verbs(
      [*speak, "--regex=[0-9]+"],
      [*speak, "--n=4"],
      [*speak, "--system=Be short."],
      [*answer, f"--out={tmp_path / 'out.jsonl'}", "--hole=X"],
      [*answer, f"--out={prompts}"],
    ),
    (
      "--regex=[0-9]+ does nothing without --prompts",
      "--n=4 does nothing without --prompts",
      "--system=Be short. does nothing without --chat",
      "--hole=X does nothing without --infill",
      "is the file of the prompts",
    ),
    strict=True,
  ):
    assert code == 2 and not out and words in err and err.count("\n") == 1
  assert prompts.read_text() == '{"prompt": "x"}\n'


def test_what_no_row_could_have_is_refused(run_verbs, nano, tmp_path):
  """A cache beyond any memory, a chat where no template is: nothing written."""
  bare = shutil.copytree(nano, tmp_path / "bare")
  file = bare / "tokenizer_config.json"
  spec = json.loads(file.read_text())
  del spec["chat_template"]
  file.write_text(json.dumps(spec))
  for name, line in (("prompt", '"x"'), ("messages", '[{"role": "user"}]')):
    (tmp_path / name).write_text(f'{{"{name}": {line}}}\n')
  out = tmp_path / "out.jsonl"
  speak = ["llama_jax.generate", f"--out={out}"]
  texts, chats = (f"--prompts={tmp_path / n}" for n in ("prompt", "messages"))
  for (code, said, err), words in zip(
    run_verbs(
      [*speak, f"--ckpt=hf:{nano}", texts, f"--cache_tokens={10**11}"],
      [*speak, f"--ckpt=hf:{bare}", chats],
    ),
    ("Out of memory", "has no chat template"),
    strict=True,
  ):
    assert code == 2 and not said and words in err, err
    assert err.count("\n") == 1
  assert {p.name for p in tmp_path.iterdir()} == {"prompt", "messages", "bare"}


def test_a_mesh_that_cannot_be_is_refused(run_verbs, nano, tmp_path):
  """By the knob as it is typed, before the weights are read."""
  text = tmp_path / "text.txt"
  text.write_text("x = 1\n")
  speak = ["llama_jax.generate", f"--ckpt=hf:{nano}", "--prompt=x"]
  measure = ["llama_jax.evaluate", f"--ckpt=hf:{nano}", f"--text={text}"]
  four = "--cpu_devices=4"
  for (code, out, err), words in zip(
    run_verbs(
      [*speak, four, "--parallel.tensor=4"],
      [*speak, four, "--parallel.data=3"],
      [*measure, four, "--parallel.data=-1", "--parallel.fsdp=-1"],
    ),
    (
      "parallel.tensor=4 does not divide model.num_kv_heads=2",
      "parallel.data=3, parallel.fsdp=1, parallel.tensor=1 need 3 devices and",
      "parallel.data=-1 and parallel.fsdp=-1: only one axis",
    ),
    strict=True,
  ):
    assert code == 2 and not out and err.count("\n") == 1
    assert words in err
