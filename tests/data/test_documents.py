"""Infilled documents, taken apart again by their tokens."""

import json

import pytest

from llama_jax import errors, text
from llama_jax.data import documents

NAMES = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>")
ROW = 200


@pytest.fixture(scope="module")
def fim(tmp_path_factory, tokenizer_folder):
  """The suite's byte-level tokenizer with StarCoder's infilling tokens."""
  folder = tmp_path_factory.mktemp("fim")
  for file in tokenizer_folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  spec = json.loads((folder / "tokenizer.json").read_text())
  for number, name in enumerate(NAMES):
    token = dict(spec["added_tokens"][0], content=name, id=500 + number)
    spec["added_tokens"].append(token)
  (folder / "tokenizer.json").write_text(json.dumps(spec))
  return text.load_tokenizer(folder)


@pytest.fixture(scope="module")
def texts(python_source):
  """Texts of up to a row's length and beyond, no two alike."""
  whole = "\n".join(python_source)
  return [
    f"{number} {whole[31 * number : 31 * number + 7 * (number % 90)]}"
    for number in range(1500)
  ]


def parts(tokenizer, ids):
  """(order, prefix, middle, suffix) of an infilled document."""
  prefix, suffix, middle, end = (tokenizer.special_tokens[n] for n in NAMES)
  bos = [tokenizer.bos_id] if tokenizer.add_bos else []
  assert ids[: len(bos)] == bos and ids[-1] == end
  ids = ids[len(bos) : -1]
  assert [sum(i == one for i in ids) for one in (prefix, suffix, middle)] == [
    1,
    1,
    1,
  ]
  a, b, c = (ids.index(one) for one in (prefix, suffix, middle))
  assert a == 0
  if (b, c) == (1, max(b, c)):
    return "spm", "", tokenizer.decode(ids[c + 1 :]), tokenizer.decode(ids[2:c])
  return (
    "psm",
    tokenizer.decode(ids[1:b]),
    tokenizer.decode(ids[c + 1 :]),
    tokenizer.decode(ids[b + 1 : c]),
  )


def test_infilled_documents_hold_the_text(fim, texts):
  rate = 0.9
  encoder = documents.Encoder(fim, ROW, rate, seed=3)
  fits = cut = spm = 0
  for index, one in enumerate(texts):
    document = encoder.document(one, index, "code")
    assert document.index == index
    plain = fim.encode(one, bos=fim.add_bos, eos=True)
    if not document.whole:
      assert document.ids == plain
      # Five tokens more, and some for words that are cut.
      fits += len(plain) <= ROW - 15
      continue
    assert len(document.ids) <= ROW
    order, prefix, middle, suffix = parts(fim, document.ids)
    assert prefix + middle + suffix == one
    fits += len(plain) <= ROW - 15
    cut += len(plain) <= ROW - 15
    spm += order == "spm"
  wholes = encoder.psm + encoder.spm
  print(f"of {fits} that fit {cut} are cut; {spm} of {wholes} are SPM")
  # Four standard deviations of a binomial.
  assert abs(cut - rate * fits) < 4 * (fits * rate * (1 - rate)) ** 0.5
  assert abs(encoder.spm - wholes / 2) < 4 * (wholes / 4) ** 0.5
  # PSM of an empty prefix looks the same.
  assert encoder.spm <= spm <= encoder.spm + 40
  assert 300 < fits < len(texts)


def test_cuts_are_uniform_at_characters(fim):
  one = "abcdefghij" * 4
  encoder = documents.Encoder(fim, ROW, 1.0, seed=0)
  lengths = []
  for index in range(2000):
    document = encoder.document(one, index, "x")
    order, prefix, middle, _ = parts(fim, document.ids)
    if order == "psm":
      lengths.append((len(prefix), len(middle)))
  # Two uniform points cut a line into thirds; the deviation of a part is
  # 0.236 of it.
  bound = 4 * 0.236 * 40 / len(lengths) ** 0.5
  for which in (0, 1):
    mean = sum(one[which] for one in lengths) / len(lengths)
    assert abs(mean - 40 / 3) < bound + 1
  assert {p for p, _ in lengths} >= set(range(1, 30))


def test_what_is_drawn_hangs_on_seed_source_and_index(fim, texts):
  one = max((t for t in texts if len(t) < 300), key=len)

  def ids(seed=0, source="a", index=0):
    encoder = documents.Encoder(fim, ROW, 1.0, seed)
    encoder.document("something before", 99, source)
    return list(encoder.document(one, index, source).ids)

  assert ids() == ids()
  others = [ids(seed=1), ids(source="b"), ids(index=1)]
  assert all(other != ids() for other in others)


def test_without_infilling_ids_are_the_tokenizers(tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)
  document = documents.Encoder(tokenizer, 4).document("import json" * 9, 5)
  want = tokenizer.encode("import json" * 9, bos=tokenizer.add_bos, eos=True)
  assert document.ids == want and not document.whole


def test_tokenizers_that_do_not_serve(tmp_path, tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)
  with pytest.raises(
    errors.ConfigError, match=r"infill_rate=0\.5: this tokenizer has no tokens"
  ):
    documents.Encoder(tokenizer, 4, 0.5)
  spec = (tokenizer_folder / "tokenizer.json").read_text()
  (tmp_path / "tokenizer.json").write_text(spec.replace("</s>", "<none>"))
  endless = text.load_tokenizer(tmp_path)
  assert endless.eos_id is None
  with pytest.raises(errors.ConfigError, match="no token that ends a text"):
    documents.Encoder(endless, 4)
