"""Filling the hole in a file."""

import json
import shutil

import pytest

from llama_jax import errors, generate
from llama_jax import text as text_lib

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

  def __init__(self, tokenizer, says):
    self._tokenizer = tokenizer
    self._says = says

  def need_tokenizer(self):
    return self._tokenizer

  def stream(self, prompt, **settings):
    self.prompt, self.settings = prompt, settings
    yield from self._says


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
  for (code, out, err), words in [
    (plain, "no tokens for infilling"),
    (both, "give one of --prompt=TEXT, --chat, --infill=FILE or"),
    (absent, "<FILL> 0 times"),
  ]:
    assert code == 2 and not out, (code, out)
    assert words in err and err.count("\n") == 1, err
