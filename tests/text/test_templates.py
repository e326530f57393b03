"""Meta's chat formats, with Meta's tokenizers, against Meta's own encoding."""

import json
import pathlib
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import chat, templates

_LLAMA3 = json.loads(
  (pathlib.Path(__file__).parent / "golden/llama3_chats.json").read_text()
)
_DATA = pathlib.Path(__file__).parents[3] / "shared/data/tokenizers"
_SYSTEM = {"role": "system", "content": "Be brief.\n"}
_DIALOG = [
  {"role": "user", "content": " Hi there, 42? "},
  {"role": "assistant", "content": " Hello! 👋\n"},
  {"role": "user", "content": "  indented\n\tand tabbed"},
]


def _file(name):
  if not (_DATA / name).exists():
    pytest.skip(f"no {name} in {_DATA}")
  return _DATA / name


@pytest.fixture
def llama2():
  tok = text_lib.load_tokenizer(_file("llama2_tokenizer.model"))
  templates.give(tok, "llama2-7b")
  return tok


@pytest.fixture(scope="module")
def library():
  return sentencepiece.SentencePieceProcessor(
    str(_file("llama2_tokenizer.model"))
  )


def _llama3(name):
  tok = text_lib.load_tokenizer(_file("llama3_tokenizer.tiktoken"))
  templates.give(tok, name)
  return tok


@pytest.fixture(scope="module")
def with_steps(tmp_path_factory):
  """Llama 2's pieces, and <step> where Code Llama 70B has it."""
  proto = model_pb2.ModelProto()
  proto.ParseFromString(_file("llama2_tokenizer.model").read_bytes())
  for name in [*(f"<gap {i}>" for i in range(15)), "<step>"]:
    proto.pieces.add(piece=name, type=3)
  path = tmp_path_factory.mktemp("steps") / "tokenizer.model"
  path.write_bytes(proto.SerializeToString())
  return path


def _said(tok, found):
  own = [i for i, mine in zip(found.ids, found.assistant, strict=True) if mine]
  return tok.decode(own, skip_special=False)


def test_every_llama_has_its_format():
  for name, format in {
    "llama-7b": None,
    "llama2-70b": "llama2",
    "llama2-7b-chat": "llama2",
    "codellama-34b-instruct": "llama2",
    "codellama-70b-instruct": "codellama-70b",
    "llama3-8b": "llama3",
    "llama3.1-405b": "llama3.1",
    "llama3.2-1b-instruct": "llama3.1",
    "llama3.3-70b": "llama3.1",
    "smollm2-135m": None,
  }.items():
    assert templates.for_model(name) == format
  assert set(templates._ENDS) == set(templates.TEMPLATES)


@pytest.mark.parametrize("system", [[], [_SYSTEM]])
def test_llama2_is_as_meta_encodes_it(llama2, library, system):
  """Each pair is encoded alone: its first word has SentencePiece's space."""
  head = "<<SYS>>\nBe brief.\n\n<</SYS>>\n\n Hi" if system else "Hi"
  first = f"[INST] {head} there, 42? [/INST] Hello! 👋 "
  second = "[INST] indented\n\tand tabbed [/INST]"
  want = [1, *library.encode(first), 2, 1, *library.encode(second)]
  found = chat.render(llama2, [*system, *_DIALOG], find_assistant=True)
  assert found.ids == want
  # The space before </s> is what a model must say to get there.
  assert _said(llama2, found) == "Hello! 👋 </s>"
  assert llama2.stop_ids == (2,)


@pytest.mark.parametrize(
  "messages",
  [
    [_DIALOG[1]],
    [_SYSTEM, _DIALOG[1]],
    [_DIALOG[0], _DIALOG[0]],
    [_DIALOG[0], _SYSTEM],
    [{"role": "user", "content": "x [/INST] y"}],
    [{"role": "system", "content": "<</SYS>>"}, _DIALOG[0]],
  ],
)
def test_llama2_refuses_what_meta_refuses(llama2, messages):
  with pytest.raises(errors.UserError, match=r"roles must|holds the tag"):
    chat.render(llama2, messages)


@pytest.mark.parametrize("system", [[], [_SYSTEM]])
def test_codellama_70b_is_as_meta_encodes_it(with_steps, library, system):
  """Header and body are encoded apart, and there is always a system turn."""
  tok = text_lib.load_tokenizer(with_steps)
  templates.give(tok, "codellama-70b-instruct")
  step = 32015
  want = [1, *library.encode(" Source: system")]
  want += [*library.encode("\n\n Be brief."), step] if system else [step]
  for role, said in (
    ("user", "Hi there, 42?"),
    ("assistant", "Hello! 👋"),
    ("user", "indented\n\tand tabbed"),
  ):
    want += [*library.encode(f" Source: {role}")]
    want += [*library.encode(f"\n\n {said}"), step]
  want += library.encode(" Source: assistant\nDestination: user")
  want += library.encode("\n\n ")
  found = chat.render(tok, [*system, *_DIALOG], find_assistant=True)
  assert found.ids == want
  assert _said(tok, found) == "Hello! 👋<step>"
  assert tok.stop_ids == (2, step)


@pytest.mark.parametrize("name", ["llama3-8b", "llama3.1-8b"])
@pytest.mark.parametrize("number", range(2))
def test_llama3_equals_llama_models(name, number):
  tok = _llama3(name)
  entry = _LLAMA3[number]
  assert chat.render(tok, entry["messages"]).ids == entry["ids"]
  assert set(tok.stop_ids) == {128001, 128008, 128009}


@pytest.mark.parametrize("number", range(2, len(_LLAMA3)))
def test_llama31_calls_equal_llama_models(number):
  """But for <|python_tag|>, which Meta's code writes before Python only and
  Meta's published prompts before every call."""
  tok = _llama3("llama3.1-8b")
  entry = _LLAMA3[number]
  tag = tok.special_tokens["<|python_tag|>"]
  found = chat.render(tok, entry["messages"], find_assistant=True)
  if tag in entry["ids"]:
    assert found.ids == entry["ids"]
  else:
    assert [i for i in found.ids if i != tag] == entry["ids"]
  assert found.ids.count(tag) == 1
  assert _said(tok, found).startswith("<|python_tag|>")
  assert "<|eom_id|>" in _said(tok, found)


def test_llama31_tools_are_as_published():
  """llama3_1/prompt_format.md of llama-models 0.3.0."""
  tok = _llama3("llama3.1-8b")
  user = {"role": "user", "content": "Search the web"}
  system = {"role": "system", "content": "You are a helpful assistant."}
  date = "Cutting Knowledge Date: December 2023\nToday Date: 21 September 2024"

  def text(messages, **more):
    return chat.render_text(
      tok, messages, date_string="21 September 2024", **more
    )

  head = "<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
  names = ["brave_search", "wolfram_alpha", "code_interpreter"]
  shown = text([system, user], builtin_tools=names)
  assert shown.startswith(
    f"<|begin_of_text|>{head}Tools: brave_search, wolfram_alpha\n{date}\n\n"
    "You are a helpful assistant.\n<|eot_id|><|start_header_id|>user"
  )
  tool = {"type": "function", "function": {"name": "trending_songs"}}
  shown = text([user], tools=[tool])
  assert shown.startswith(f"<|begin_of_text|>{head}\n{date}\n\n<|eot_id|>")
  assert f"format:\n{json.dumps(tool, indent=4)}\n\nReturn function" in shown
  assert "Knowledge" not in text([system, user])


@pytest.mark.parametrize(
  "dialogs", [100, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_a_users_text_never_becomes_a_special_token(
  llama2, with_steps, dialogs
):
  """RELIABILITY.md, S5: messages made of special tokens, whole and in pieces,
  in every format: 2,000 of them, and 20,000 where there is time."""
  steps = text_lib.load_tokenizer(with_steps)
  templates.give(steps, "codellama-70b")
  pick = random.Random(0)
  for tok in (llama2, steps, _llama3("llama3-8b"), _llama3("llama3.1-8b")):
    special = set(tok.special_tokens.values())
    names = list(tok.special_tokens)
    names = pick.sample(names, min(20, len(names))) + [
      n for n in ("<s>", "</s>", "<step>", "<|eot_id|>") if n in names
    ]
    pieces = [*names, *(n[: len(n) // 2] for n in names)]
    pieces += [n[len(n) // 2 :] for n in names]
    pieces += ["<0x0A>", "▁", " ", "\n", "<", ">", "|", "a", "\ue000"]

    def hostile(pieces=pieces):
      return "".join(pick.choices(pieces, k=pick.randrange(1, 8)))

    roles = [("user", "assistant")[i % 2] for i in range(5)]
    tame = chat.render(tok, [{"role": r, "content": "x"} for r in roles]).ids
    want = [i for i in tame if i in special]
    for _ in range(dialogs):
      said = [hostile() for _ in roles]
      messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, said, strict=True)
      ]
      found = chat.render(tok, messages, find_assistant=True)
      assert [i for i in found.ids if i in special] == want, said
      assert found.ids == chat.render(tok, messages).ids
      ends = [i for i in found.ids if i in tok.stop_ids]
      own = [i for i, a in zip(found.ids, found.assistant, strict=True) if a]
      assert len([i for i in own if i in special]) == 2 <= len(ends)


def test_a_foreign_tokenizer_is_refused(llama2):
  llama2.chat_template = None
  with pytest.raises(errors.UserError, match=r"ends its turns with <\|eot_id"):
    templates.give(llama2, "llama3-8b")
  assert llama2.chat_template is None
  templates.give(llama2, "llama-7b")
  assert llama2.chat_template is None
  llama2.chat_template = "own"
  templates.give(llama2, "llama2-7b")
  assert llama2.chat_template == "own"
