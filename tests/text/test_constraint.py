"""What may come next, against every text that a grammar allows, `json` and
`re`."""

import concurrent.futures
import functools
import itertools
import json
import pathlib
import random
import re

import numpy as np
import pytest

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import byte_level, constraint, grammar, train_sentencepiece

_DATA = pathlib.Path(__file__).parents[3] / "shared/data/tokenizers"


def _bytes_first(model):
  """GGUF metadata of single bytes and some words, so that letters beyond
  ASCII are split over tokens."""
  import tokenizers

  if model == "gpt2":
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, "Ġa", '{"', "ab", "Ġ"]
    return {
      "tokenizer.ggml.model": model,
      "tokenizer.ggml.merges": ["Ġ a", '{ "', "a b"],
      "tokenizer.ggml.tokens": tokens[:-1],
      "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 3),
      "tokenizer.ggml.bos_token_id": 0,
      "tokenizer.ggml.eos_token_id": 1,
    }
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
  words = ["▁", "a", "b", "▁a", "ab", "▁ab", '▁{"', "▁▁", "é", "▁é"]
  return {
    "tokenizer.ggml.model": model,
    "tokenizer.ggml.tokens": tokens + words,
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0] * len(words),
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
  }


@pytest.fixture(scope="module")
def tokenizers_here(tmp_path_factory, python_source, tokenizer_folder):
  """name -> a tokenizer that every machine can make."""
  folder = tmp_path_factory.mktemp("tokenizers")
  lines = [
    line
    for text in python_source
    for line in train_sentencepiece.sentences(text)
  ]
  (folder / "trained").write_bytes(train_sentencepiece.train(lines, 500))
  trained = json.loads((tokenizer_folder / "tokenizer.json").read_text())
  tokens = [bytes([b]) for b in range(256)]
  tokens += [
    byte_level.in_bytes("".join(pair)) for pair in trained["model"]["merges"]
  ]
  (folder / "ranks").write_bytes(byte_level.ranks_lines(tokens))
  return {
    "sentencepiece": text_lib.load_tokenizer(folder / "trained"),
    "byte level": text_lib.load_tokenizer(tokenizer_folder),
    "tiktoken": text_lib.load_tokenizer(folder / "ranks"),
    **{m: text_lib.from_gguf_metadata(_bytes_first(m)) for m in _GGUF},
  }


_GGUF = ("gpt2", "llama")
_HERE = ("sentencepiece", "byte level", "tiktoken", *_GGUF)
_REAL = ("llama2_tokenizer.model", "llama3_tokenizer.tiktoken", "tok512.model")


@pytest.fixture(params=[*_HERE, *_REAL])
def tok(request):
  if request.param in _HERE:
    return request.getfixturevalue("tokenizers_here")[request.param]
  return _real(request.param)


@functools.cache
def _real(name):
  if not (_DATA / name).exists():
    pytest.skip(f"needs {_DATA / name}")
  return text_lib.load_tokenizer(_DATA / name)


@pytest.fixture
def small(tokenizers_here):
  return tokenizers_here["llama"]


def _allowed(mask, tok):
  assert mask.dtype == np.uint32 and mask.shape == (-(-tok.vocab_size // 32),)
  ids = np.arange(32 * mask.size, dtype=np.uint32)
  return set(ids[(mask[ids // 32] >> ids % 32 & 1).astype(bool)].tolist())


@functools.cache
def _short(tok):
  """Ids of the tokens of one byte."""
  return {
    id
    for id in range(tok.vocab_size)
    if len(tok.join_bytes([id], True)[0]) == 1
  }


def _walk(tok, state, pick, most=3000):
  """Ids of a text written at random, which ends where it may, half the time.

  Tokens of one byte are as likely as all the others, lest every walk through
  a large vocabulary should be one of long words.
  """
  ids = []
  while not state.done:
    assert len(ids) < most, tok.decode(ids)
    allowed = _allowed(state.mask(), tok)
    assert allowed
    stops = sorted(allowed & set(tok.stop_ids))
    inside = sorted(allowed - set(stops))
    if stops and (not inside or pick.random() < 0.5):
      state.accept([pick.choice(stops)])
      assert state.done
      break
    short = [i for i in inside if i in _short(tok)]
    group = short if short and pick.random() < 0.5 else inside
    ids.append(pick.choice(group))
    state.accept(ids[-1:])
  assert _allowed(state.mask(), tok) == set(tok.stop_ids)
  return ids


_WORDS = ["ab", "a b", " a", "é你", "\U00010348", "</s>", "a"]
_LANGUAGES = {
  "regex": (
    {"regex": f"(?:{'|'.join(_WORDS)}){{1,2}}/?"},
    {
      "".join(words) + end
      for count in (1, 2)
      for words in itertools.product(_WORDS, repeat=count)
      for end in ("", "/")
    },
  ),
  "schema": (
    {"json_schema": {"enum": ["ab", " a", "é你", "</s>", 12, True, None]}},
    {'"ab"', '" a"', '"é你"', '"</s>"', "12", "true", "null"},
  ),
}


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("name", _LANGUAGES)
def test_masks_equal_those_by_trying_every_token(tok, name, continues):
  """So that no token leads astray, none is kept back, and every one leaves
  an end within reach."""
  knobs, texts = _LANGUAGES[name]
  texts = {text.encode() for text in texts}
  hidden = {*tok.special_tokens.values(), *tok.stop_ids}
  pieces = {
    started: {
      id: tok.join_bytes([id], started)[0]
      for id in range(tok.vocab_size)
      if id not in hidden
    }
    for started in (False, True)
  }
  first = constraint.compile(tok, continues=continues, **knobs)
  ended = set()
  for seed in range(6):
    pick = random.Random(seed)
    state, text, ids = first.copy(), b"", []
    while not state.done:
      begins = {t[: len(text) + n] for t in texts for n in range(1, len(t) + 1)}
      want = {
        id
        for id, piece in pieces[continues or bool(ids)].items()
        if piece and text + piece in begins
      }
      if text in texts:
        want |= set(tok.stop_ids)
      found = _allowed(state.mask(), tok)
      assert found == want, text
      if not found - set(tok.stop_ids):
        break
      ids.append(pick.choice(sorted(found - set(tok.stop_ids))))
      text += pieces[continues or len(ids) > 1][ids[-1]]
      state.accept(ids[-1:])
    ended.add(text)
    assert text in texts
    assert continues or tok.decode(ids).encode() == text
  assert len(ended) > 1


def _is_tree(value):
  return value is None or (
    set(value) == {"leaves"}
    and len(value["leaves"]) <= 2
    and all(map(_is_tree, value["leaves"]))
  )


_SCHEMAS = {
  "person": (
    {
      "title": "Person",
      "type": "object",
      "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {
          "type": "array",
          "items": {"enum": ["a", "b c", "é"]},
          "minItems": 1,
          "maxItems": 3,
        },
      },
      "required": ["name", "age"],
      "additionalProperties": False,
    },
    lambda v: (
      {"name", "age"} <= set(v) <= {"name", "age", "tags"}
      and isinstance(v["name"], str)
      and 1 <= len(v["name"]) <= 9
      and type(v["age"]) is int
      and 0 <= v["age"] <= 150
      and 1 <= len(v.get("tags", ["a"])) <= 3
      and set(v.get("tags", [])) <= {"a", "b c", "é"}
    ),
  ),
  "union": (
    {
      "anyOf": [
        {"type": "null"},
        {"type": "number", "minimum": -2, "exclusiveMaximum": 3.5},
        {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
        {"type": "string", "format": "date"},
      ]
    },
    lambda v: (
      v is None
      or (type(v) in (int, float) and -2 <= v < 3.5)
      or re.fullmatch(r"[A-Z]{2}[0-9]{1,3}|[0-9]{4}-[01][0-9]-[0-3][0-9]", v)
    ),
  ),
  "tree": (
    {
      "$ref": "#/$defs/tree",
      "$defs": {
        "tree": {
          "anyOf": [
            {"type": "null"},
            {
              "type": "object",
              "properties": {
                "leaves": {
                  "type": "array",
                  "maxItems": 2,
                  "items": {"$ref": "#/$defs/tree"},
                }
              },
              "required": ["leaves"],
              "additionalProperties": False,
            },
          ]
        }
      },
    },
    _is_tree,
  ),
  "merged": (
    {
      "allOf": [
        {"type": "object", "required": ["kind"]},
        {"properties": {"kind": {"const": "x"}, "n": {"multipleOf": 5}}},
      ],
      "properties": {
        "n": {"type": "integer", "minimum": 10, "maximum": 40},
        "kind": {"type": "string"},
      },
      "additionalProperties": False,
    },
    lambda v: (
      v["kind"] == "x"
      and set(v) <= {"kind", "n"}
      and v.get("n", 10) in range(10, 41, 5)
    ),
  ),
}


@pytest.mark.parametrize("name", _SCHEMAS)
def test_what_is_written_fits_the_schema(tok, name):
  schema, fits = _SCHEMAS[name]
  first = constraint.compile(tok, json_schema=schema)
  values = []
  for seed in range(12):
    ids = _walk(tok, first.copy(), random.Random(seed))
    value = json.loads(tok.decode(ids))
    assert fits(value), value
    # No escape makes half a surrogate pair.
    json.dumps(value, ensure_ascii=False).encode()
    values.append(json.dumps(value))
  assert len(set(values)) > 1


@pytest.mark.parametrize(
  "pattern",
  [
    r"\d{1,4}(\.\d\d)?",
    r"[\w.-]{1,8}@\w{1,5}\.(com|org)",
    r"(?i)no|maybe",
    r"[^\W\d_]{2,6}\s\S",
    r"^a?/b{2,}[^b]\n?$",
    r"(?:.é?){3}|\\{1,2}",
  ],
)
def test_what_is_written_matches_the_expression(tok, pattern):
  first = constraint.compile(tok, regex=pattern)
  for seed in range(8):
    text = tok.decode(_walk(tok, first.copy(), random.Random(seed)))
    assert re.fullmatch(pattern, text, re.ASCII), text


def test_a_special_token_is_never_text(tok):
  state = constraint.compile(tok, json_schema={"type": "string"})
  inside = constraint.compile(tok, regex="(?s).*")
  specials = set(tok.special_tokens.values())
  state.accept([_id_of(tok, b'"')])
  assert not _allowed(state.mask(), tok) & (specials | set(tok.stop_ids))
  assert _allowed(inside.mask(), tok) & specials <= set(tok.stop_ids)


def _id_of(tok, data):
  return next(
    id for id in range(tok.vocab_size) if tok.join_bytes([id], True)[0] == data
  )


def test_copies_go_their_own_ways(small):
  one = constraint.compile(small, regex="a(b|c)d?")
  one.accept([_id_of(small, b"a")])
  two, three = one.copy(), one.copy()
  before = one.mask()
  two.accept([_id_of(small, b"b"), _id_of(small, b"d")])
  assert two.done and not one.done and not three.done
  assert (one.mask() == before).all() and (three.mask() == before).all()
  one.accept([_id_of(small, b"c"), *small.stop_ids[:1]])
  assert one.done
  three.accept([_id_of(small, b"b")])
  assert small.stop_ids[0] in _allowed(three.mask(), small)
  assert two.copy().done


def test_a_mask_is_its_holders_own(small):
  state = constraint.compile(small, regex="ab")
  before = state.mask()
  state.mask()[:] = 0
  assert (state.mask() == before).all()
  state.accept([_id_of(small, b"ab")])
  state.mask()[:] = 0
  assert _allowed(state.mask(), small) == set(small.stop_ids)


def test_what_the_mask_forbids_is_refused(small):
  a, b = _id_of(small, b"a"), _id_of(small, b"b")
  first = constraint.compile(small, regex="ab")
  for tokens, words in [
    ([b], "cannot be kept"),
    ([small.bos_id], "cannot be kept"),
    ([small.vocab_size], "no id of this"),
    ([-1], "no id of this"),
    ([a, small.eos_id], "before the text was complete"),
    ([a, b, b], "after the text's end"),
    ([a, b, small.eos_id, a], "after the text's end"),
  ]:
    with pytest.raises(errors.UserError, match=words):
      first.copy().accept(tokens)


def test_rows_beyond_the_vocabulary_are_never_allowed(small):
  state = constraint.compile(small, regex="a.*", vocab_size=1000)
  for _ in range(2):
    mask = state.mask()
    assert mask.shape == (32,)
    assert not mask[-(-small.vocab_size // 32) :].any()
    state.accept([_id_of(small, b"a")])


def test_a_vocabulary_may_lack_what_ends_or_goes_on():
  fields = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["x", "y", "a", "b"],
    "tokenizer.ggml.merges": [],
  }
  tok = text_lib.from_gguf_metadata(fields)
  assert not tok.stop_ids
  state = constraint.compile(tok, regex="ab")
  state.accept([2])
  assert _allowed(state.mask(), tok) == {3}
  state.accept([3])
  assert state.done and not state.mask().any()
  with pytest.raises(errors.UserError, match="a token for each byte"):
    constraint.compile(tok, regex="c")
  state = constraint.compile(tok, regex="ac")
  assert _allowed(state.mask(), tok) == {2}
  state.accept([2])
  with pytest.raises(errors.UserError, match="a token for each byte"):
    state.mask()


def test_white_space_has_an_end(small):
  """A small model's favourite: spaces without end."""
  state = constraint.compile(small, json_schema={"type": "object"})
  state.accept([_id_of(small, b"{"), _id_of(small, b"\n")])
  count = 0
  while _id_of(small, b" ") in _allowed(state.mask(), small):
    state.accept([_id_of(small, b" ")])
    count += 1
  assert count == 32


def _chain(count):
  links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
  last = {f"a{count}": {"type": "null"}}
  return {"$ref": "#/$defs/a0", "$defs": links | last}


def _nested(count):
  schema = {"type": "null"}
  for _ in range(count):
    schema = {"items": schema}
  return schema


_WIDE = {"type": "object", "properties": {f"k{i}": {} for i in range(1500)}}


@pytest.mark.parametrize(
  "knobs, words",
  [
    ({}, "either json_schema or regex"),
    ({"json_schema": {}, "regex": "a"}, "either json_schema or regex"),
    ({"regex": 5}, "regex is int"),
    ({"regex": "(a"}, "regex is refused: unclosed group"),
    ({"regex": "a)(b"}, "regex is refused: unopened group"),
    ({"regex": "a(?=b)"}, "regex is refused: look-around"),
    ({"regex": r"(a)\1"}, "regex is refused: backreferences"),
    ({"regex": "[a&&b]"}, "regex is refused: no text fits it"),
    ({"regex": ""}, "no text but the empty one"),
    ({"regex": "$"}, "no text but the empty one"),
    ({"regex": "a" * 9000}, "regex has 9000 characters; at most 8192"),
    ({"regex": "\ud800"}, "regex: .* surrogate"),
    ({"regex": ".*" * 300}, "regex is refused: lexer too many"),
    ({"json_schema": {"multipleOf": 12345678}}, "takes more than a second"),
    ({"json_schema": []}, "json_schema is list"),
    ({"json_schema": "3"}, "json_schema is int"),
    ({"json_schema": '{"a'}, "json_schema is no JSON"),
    ({"json_schema": {"const": float("nan")}}, "json_schema is no JSON"),
    ({"json_schema": {"const": {1}}}, "json_schema is no JSON"),
    ({"json_schema": {"const": "\ud800"}}, "json_schema: .* surrogate"),
    ({"json_schema": False}, "schema is false"),
    ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
    ({"json_schema": {"not": {}}}, 'Unimplemented keys: \\["not"\\]'),
    (
      {"json_schema": {"not": {}, "x-guidance": {"lenient": True}}},
      'Unimplemented keys: \\["not"\\]',
    ),
    ({"json_schema": {"$ref": "#/no"}}, "'/no' does not exist"),
    ({"json_schema": {"$ref": "#"}}, "no text fits it"),
    ({"json_schema": {"$ref": "http://x/y"}}, "does not fetch"),
    ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
    (
      {"json_schema": {"oneOf": [{"minimum": 1}, {"maximum": 2}]}},
      "use anyOf",
    ),
    ({"json_schema": {"enum": ["x" * 200_000]}}, "characters; at most 131072"),
    ({"json_schema": _WIDE}, "too many ways to go on"),
    ({"json_schema": _nested(80)}, "nested 81 levels deep; at most 64"),
    ({"json_schema": "[" * 100_000}, "nested too deep; at most 64"),
    ({"json_schema": _chain(600)}, r"has 601 \$refs; at most 500"),
  ],
)
def test_refused_in_one_line(small, knobs, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    constraint.compile(small, **knobs)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_too_deep_for_python_is_refused_too(small):
  schema = _nested(100_000)
  with pytest.raises(errors.UserError, match="nested too deep; at most 64"):
    constraint.compile(small, json_schema=schema)


def test_at_the_bounds_it_works(small):
  state = constraint.compile(small, json_schema=_chain(499))
  state.accept([_id_of(small, bytes([b])) for b in b"null"])
  assert state.done
  state = constraint.compile(small, json_schema=_nested(62))
  assert _id_of(small, b"[") in _allowed(state.mask(), small)


def test_what_brings_the_compiler_down_leaves_us_standing(small, monkeypatch):
  """As thousands of chained $refs do, were they not counted before."""
  monkeypatch.setattr(grammar, "_MAX_REFS", 10**9)
  monkeypatch.setattr(grammar, "_MAX_SCHEMA", 10**9)
  with pytest.raises(errors.UserError, match="brought its compiler down"):
    constraint.compile(small, json_schema=_chain(50_000))


def test_a_grammar_that_grows_ends_its_own_text_only(small, monkeypatch):
  # Its lexer has some 2^18 states, of which a text visits one a letter.
  knobs = {"regex": "(?:a|b)*a(?:a|b){18}"}
  other = constraint.compile(small, **knobs)
  limits = grammar._LIMITS | {"max_lexer_states": 300}
  monkeypatch.setattr(grammar, "_LIMITS", limits)
  state = constraint.compile(small, **knobs)
  pair = [_id_of(small, b"a"), _id_of(small, b"b")]
  ids = random.Random(0).choices(pair, k=1000)
  with pytest.raises(errors.UserError, match="cannot be kept any further"):
    for id in ids:
      state.mask()
      state.accept([id])
  with pytest.raises(errors.UserError, match="cannot be kept any further"):
    state.mask()
  other.accept(ids)
  assert other.mask().any()


def test_threads_share_one_table(small):
  patterns = [f"a{{{n}}}b" for n in range(1, 9)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    states = list(
      pool.map(lambda p: constraint.compile(small, regex=p), patterns)
    )
  for pattern, state in zip(patterns, states, strict=True):
    text = small.decode(_walk(small, state, random.Random(0)))
    assert re.fullmatch(pattern, text)
  assert len({id(state._table) for state in states}) == 1
