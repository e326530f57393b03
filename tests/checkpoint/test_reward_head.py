"""Reward models in transformers' folders and in ours, and in no other format.

tests/golden/make_reward.py made the numbers, in float32 on both sides.
"""

import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from llama_jax import convert, errors, text
from llama_jax import llama as llama_lib
from llama_jax.checkpoint import (
  describe,
  gguf_write,
  hugging_face,
  meta,
  names,
  proof,
  store,
  verify,
  weights,
)
from llama_jax.model import decoder as decoder_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "reward"


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture
def folder(tmp_path):
  """transformers' folder, to be spoilt."""
  path = tmp_path / "model"
  path.mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(GOLDEN / name, path)
  return path


def edit(folder, **fields):
  """Replaces keys of config.json; a value of ... removes the key."""
  path = folder / "config.json"
  config = json.loads(path.read_text()) | fields
  config = {k: v for k, v in config.items() if v is not ...}
  path.write_text(json.dumps(config))


def put(folder, **tensors):
  """Replaces tensors; None removes one."""
  file = folder / "model.safetensors"
  held = safetensors.numpy.load_file(file)
  held |= {k.replace("__", "."): v for k, v in tensors.items()}
  held = {k: v for k, v in held.items() if v is not None}
  safetensors.numpy.save_file(held, file)


def files_of(path):
  return safetensors.numpy.load_file(path / "model.safetensors")


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype
    assert ours[name].tobytes() == value.tobytes(), name


def test_scores_are_those_of_transformers(golden):
  """Of every token, and what transformers itself takes for a row's."""
  config, params, _ = hugging_face.read(GOLDEN)
  assert config.head == "scalar" and "head" not in params
  ids, lengths = golden["ids"].astype(np.int32), golden["lengths"]
  positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
  real = positions < lengths[:, None]
  decoder = decoder_lib.Decoder(config, attention="reference")
  ours = jax.jit(
    lambda params, *batch: decoder.apply(
      {"params": params}, *batch, method="rewards"
    )
  )(params, ids, positions, real.astype(np.int32))
  ours = np.asarray(ours)
  np.testing.assert_allclose(ours[real], golden["rewards"][real], atol=1e-5)
  rows = np.arange(len(ids))
  np.testing.assert_allclose(
    ours[rows, lengths - 1], golden["scores"], atol=1e-5
  )
  # A score read one token early would show.
  early = ours[rows, lengths - 2]
  assert np.abs(early - golden["scores"]).min() > 1e-2


def test_the_second_llama_scores_alike(golden):
  config, source = hugging_face.open_tensors(GOLDEN)
  (theirs,) = proof.reference_logits(config, source, golden["ids"][0])
  assert theirs.shape == (golden["lengths"][0], 1)
  np.testing.assert_allclose(theirs[:, 0], golden["rewards"][0], atol=1e-5)


def test_what_transformers_wrote_comes_back(tmp_path):
  config, params, _ = hugging_face.read(GOLDEN)
  hugging_face.write(tmp_path / "m", config, params, None)
  assert_same(files_of(tmp_path / "m"), files_of(GOLDEN))
  before = json.loads((GOLDEN / "config.json").read_text())
  after = json.loads((tmp_path / "m" / "config.json").read_text())
  for key in set(before) & set(after):
    assert after[key] == before[key], key
  assert after["architectures"] == ["LlamaForSequenceClassification"]
  assert len(after["id2label"]) == 1


@pytest.mark.parametrize(
  "fields",
  [
    {"id2label": ..., "num_labels": 1},
    {"id2label": {"0": "REWARD"}},
    {"id2label": {"0": "REWARD"}, "pad_token_id": ...},
  ],
)
def test_a_classifier_of_one_label_is_a_reward_model(folder, fields):
  edit(folder, **fields)
  assert hugging_face.read_config(folder).head == "scalar"


@pytest.mark.parametrize(
  "fields, labels",
  [
    ({"id2label": ...}, 2),  # what transformers then means
    ({"id2label": {"0": "good", "1": "bad"}}, 2),
    ({"id2label": ..., "num_labels": 5}, 5),
    ({"id2label": ["REWARD"]}, 2),
  ],
)
def test_other_classifiers_are_refused(folder, fields, labels):
  edit(folder, **fields)
  with pytest.raises(errors.BadFileError, match=f"of {labels} labels"):
    hugging_face.read(folder)


def test_tensors_of_another_head_are_refused(folder):
  edit(folder, architectures=["LlamaForCausalLM"])
  with pytest.raises(
    errors.BadFileError, match=r"score\.weight \[1, 24\].*model\.head=words"
  ):
    hugging_face.read(folder)
  shutil.copy(GOLDEN / "config.json", folder)
  put(folder, score__weight=np.ones((2, 24), np.float32))
  with pytest.raises(
    errors.BadFileError,
    match=r"score\.weight is \[2, 24\] but model\.head=scalar makes it \[1, 24",
  ):
    hugging_face.read(folder)
  put(folder, score__weight=None)
  with pytest.raises(
    errors.BadFileError, match=r"lacks .*score\.weight.*model\.head=scalar dem"
  ):
    hugging_face.read(folder)
  edit(folder, tie_word_embeddings=False)
  put(
    folder,
    score__weight=np.ones((1, 24), np.float32),
    lm_head__weight=np.ones((40, 24), np.float32),
  )
  with pytest.raises(
    errors.BadFileError, match=r"lm_head\.weight.*model\.head=scalar"
  ):
    hugging_face.read(folder)


def test_there_and_back_with_the_proof(tmp_path, capsys):
  """hf -> orbax -> hf: the same tensors, and rewards compared for the proof."""
  for source, destination in (
    (f"hf:{GOLDEN}", f"orbax:{tmp_path}/o"),
    (f"orbax:{tmp_path}/o", f"hf:{tmp_path}/h"),
  ):
    convert.convert(convert.Job(source, destination), check=True)
    said = capsys.readouterr().out
    # RoPE is scaled: at near positions and at far ones.
    assert said.count("largest reward difference") == 2, said
    assert "logit" not in said
  config, params, _ = store.read(tmp_path / "o")
  assert config == hugging_face.read_config(GOLDEN)
  assert names.flatten(params)["score/kernel"].shape == (24, 1)
  assert_same(files_of(tmp_path / "h"), files_of(GOLDEN))


def test_the_proof_refuses_other_rewards():
  """One weight of the score is 5 % off: too much."""
  config, source = hugging_face.open_tensors(GOLDEN)
  sound = verify.Side("a", config, source, None)
  settings = {"rounded": False, "block_bytes": 1000, "max_bytes": 10**9}
  assert len(verify.forward(sound, sound, **settings)) == 2

  def moved(name, start, stop):
    value = source.rows(name, start, stop).copy()
    if name == "score.weight":
      value[0, 3] *= 1.05
    return value

  spoilt = weights.Source("b", "hf", source.tensors, moved)
  with pytest.raises(errors.BadFileError, match="largest reward difference"):
    verify.forward(sound, verify.Side("b", config, spoilt, None), **settings)


@pytest.mark.parametrize("scheme", ["meta", "gguf"])
def test_formats_without_a_place_for_it_say_what_has(scheme, tmp_path):
  message = rf"reward model, and {scheme}: has no place.*use hf: or orbax:"
  job = convert.Job(f"hf:{GOLDEN}", f"{scheme}:{tmp_path}/x")
  with pytest.raises(errors.UserError, match=message):
    convert.convert(job, check=True)
  write = {"meta": meta.write, "gguf": gguf_write.write}[scheme]
  config, params, _ = hugging_face.read(GOLDEN)
  with pytest.raises(errors.UserError, match=message):
    write(tmp_path / "y", config, params, None)
  assert not list(tmp_path.iterdir())


def test_it_speaks_no_words():
  """What generate and evaluate begin with."""
  with pytest.raises(errors.UserError, match=r"--ckpt=hf:.* is a reward model"):
    llama_lib.load(f"hf:{GOLDEN}", knob="--ckpt")


def test_described():
  config, source = hugging_face.open_tensors(GOLDEN)
  said = describe.describe(verify.Side("x", config, source, None))
  assert "a reward model" in said and "tied" not in said


WORDS = ["<unk>", "<s>", "</s>", *"abcd", "<|im_end|>", "<pad>"]


@pytest.mark.parametrize("pad, written", [(8, 8), (7, None), (None, None)])
def test_what_pads_is_said_where_it_ends_no_turn(pad, written, tmp_path):
  """transformers scores the last token that is not pad_token_id."""
  fields = {} if pad is None else {"tokenizer.ggml.padding_token_id": pad}
  tokenizer = text.from_gguf_metadata(
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": WORDS,
      "tokenizer.ggml.token_type": [3 if "<" in w else 1 for w in WORDS],
      "tokenizer.ggml.merges": [],
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      **fields,
    }
  )
  config, params, _ = hugging_face.read(GOLDEN)
  hugging_face.write(tmp_path / "m", config, params, tokenizer)
  said = json.loads((tmp_path / "m" / "config.json").read_text())
  assert said.get("pad_token_id") == written
  assert said["eos_token_id"] == [2, 7]


THEIRS = """
import json, sys, torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(
  sys.argv[1], dtype=torch.float32
).eval()
with torch.no_grad():
  print(json.dumps([
    model(torch.tensor([row])).logits.item() for row in json.loads(sys.argv[2])
  ]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  "PEER_PYTHON" not in os.environ, reason="needs a Python with transformers"
)
def test_transformers_scores_what_we_write(golden, tmp_path):
  """Through orbax: what we write loads as it is and scores the same."""
  for source, destination in (
    (f"hf:{GOLDEN}", f"orbax:{tmp_path}/o"),
    (f"orbax:{tmp_path}/o", f"hf:{tmp_path}/h"),
  ):
    convert.convert(convert.Job(source, destination), check=True)
  rows = [
    row[:length].tolist()
    for row, length in zip(golden["ids"], golden["lengths"], strict=True)
  ]
  done = subprocess.run(
    [os.environ["PEER_PYTHON"], "-c", THEIRS, tmp_path / "h", json.dumps(rows)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  theirs = json.loads(done.stdout.splitlines()[-1])
  np.testing.assert_allclose(theirs, golden["scores"], atol=1e-5)
