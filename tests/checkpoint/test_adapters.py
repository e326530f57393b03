"""LoRA runs on disk: read as the models they make, and handed to PEFT.

tests/golden/make_lora.py made the base and PEFT's own folder of adapters.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llama_jax import checkpoint, convert, errors
from llama_jax.checkpoint import (
  adapters,
  gguf_write,
  hugging_face,
  names,
  peft,
  steps,
  store,
  weights,
)
from llama_jax.decoding import placement
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import lora as lora_lib
from llama_jax.parallel import mesh as mesh_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lora"
THEIRS = GOLDEN / "adapter"
LORA = lora_lib.LoRA(3, 5, lora_lib.TARGETS, "bfloat16")


def held_by_peft():
  return safetensors.numpy.load_file(THEIRS / peft.WEIGHTS)


def tree():
  """PEFT's adapters as our tree, by Hugging Face's names of the weights."""
  theirs, leaves = held_by_peft(), {}
  for row in names.TABLE:
    if row.path.split("/")[-2] not in LORA.targets:
      continue
    layer = f"base_model.model.{row.hugging_face.removesuffix('.weight')}"
    for letter in "AB":
      path = row.path.replace("kernel", f"lora_{letter.lower()}")
      name = f"{layer}.lora_{letter}.weight"
      leaves[path] = np.stack([theirs[name.format(layer=i)].T for i in (0, 1)])
  return names.nest(leaves)


def save(folder, params, step):
  with steps.Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(step, params, {"count": np.ones(1)}, {"step": step})


def make_run(folder, base, params=None, lora=LORA, config=None):
  """What train keeps of a LoRA run."""
  config = config or checkpoint.read_config(base)
  store.write_model(folder, config, None)
  adapters.write(folder, lora, checkpoint.pin(base))
  save(folder, params or tree(), 3)
  return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("lora") / "run", f"hf:{GOLDEN}/base")


def merged_by_hand(base, lora=LORA):
  """Hugging Face's name -> W + alpha / r B A, in float64."""
  theirs, found = held_by_peft(), {}
  for name, weight in base.items():
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{layer}.lora_A.weight" in theirs:
      a, b = (
        theirs[f"{layer}.lora_{letter}.weight"].astype(np.float64)
        for letter in "AB"
      )
      weight = weight.astype(np.float64) + lora.alpha / lora.rank * b @ a
    found[name] = weight
  return found


def bits(params):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def test_a_run_reads_as_the_model_it_makes(run):
  base = safetensors.numpy.load_file(GOLDEN / "base" / "model.safetensors")
  config, source = store.open_tensors(run)
  want = merged_by_hand(base)
  assert set(source.tensors) == set(want)
  changed = 0
  for name, weight in want.items():
    found = source.get(name)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, weight, rtol=1e-6, atol=1e-7)
    changed += not np.array_equal(found, base[name])
    np.testing.assert_array_equal(source.rows(name, 3, 5), found[3:5])
  assert changed == 2 * len(lora_lib.TARGETS)
  params = store.read_params(run)
  assert isinstance(jax.tree.leaves(params)[0], jax.Array)
  assert bits(params) == bits(weights.read_params(config, source))
  # A step's own folder names that step; load is what the verbs call.
  again = checkpoint.load(f"orbax:{run}/checkpoints/3").params
  assert bits(again) == bits(params)


def test_onto_a_mesh(run):
  devices = mesh_lib.make(mesh_lib.ParallelConfig(data=2, fsdp=2, tensor=2))
  config = store.read_config(run)
  placed = placement.shardings(config, devices)
  loaded = checkpoint.load(f"orbax:{run}", shardings=placed)
  query = loaded.params["layers"]["attention"]["query"]["kernel"]
  assert query.sharding.spec == jax.P(None, "fsdp", "tensor")
  assert bits(loaded.params) == bits(store.read_params(run))


def test_any_base_keeps_its_layout_and_dtype(tmp_path):
  """GGUF's: heads interleaved, bfloat16. And a run upon a run."""
  config, params, _ = hugging_face.read(GOLDEN / "base")
  half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
  gguf_write.write(tmp_path / "base.gguf", config, half, None)
  hugging_face.write(tmp_path / "base", config, half, None)
  first = make_run(tmp_path / "first", f"gguf:{tmp_path}/base.gguf")
  base = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
  _, source = store.open_tensors(first)
  for name, weight in merged_by_hand(base).items():
    found = source.get(name)
    # GGUF keeps norms in float32.
    assert found.dtype == (np.float32 if found.ndim == 1 else base[name].dtype)
    near = {"rtol": 2**-8, "atol": 1e-7}
    np.testing.assert_allclose(
      found.astype(np.float32), weight.astype(np.float64), **near
    )
  # Upon its newest step, whatever that run does later.
  second = make_run(tmp_path / "second", f"orbax:{first}")
  assert adapters.read(second).base == f"orbax:{first}/checkpoints/3"
  want = store.open_tensors(second)[1].get("model.layers.1.mlp.up_proj.weight")
  with steps.Checkpoints(first, keep=2) as checkpoints:
    zeros = jax.tree.map(np.zeros_like, tree())
    checkpoints.save(4, zeros, {"count": np.ones(1)}, {})
  again = store.open_tensors(second)[1].get("model.layers.1.mlp.up_proj.weight")
  assert want.tobytes() == again.tobytes()


def test_fewer_targets_leave_the_rest_alone(tmp_path):
  lora = dataclasses.replace(LORA, targets=("query", "down"))
  layers = tree()["layers"]
  some = {
    "layers": {
      "attention": {"query": layers["attention"]["query"]},
      "mlp": {"down": layers["mlp"]["down"]},
    }
  }
  base = f"hf:{GOLDEN}/base"
  run = make_run(tmp_path / "run", base, some, lora)
  _, before = checkpoint.open_tensors(base)
  _, after = store.open_tensors(run)
  changed = {n for n in before.tensors if (before.get(n) != after.get(n)).any()}
  assert changed == {
    f"model.layers.{i}.{name}.weight"
    for i in (0, 1)
    for name in ("self_attn.q_proj", "mlp.down_proj")
  }


def test_it_goes_to_other_formats_with_the_proof(run, tmp_path, capsys):
  job = convert.Job(f"orbax:{run}", f"hf:{tmp_path}/whole")
  convert.convert(job, check=True)
  assert "largest logit difference" in capsys.readouterr().out
  written = safetensors.numpy.load_file(tmp_path / "whole/model.safetensors")
  _, source = store.open_tensors(run)
  assert {n: w.tobytes() for n, w in written.items()} == {
    name: source.get(name).tobytes() for name in source.tensors
  }


def test_peft_gets_what_it_wrote_itself(run, tmp_path, capsys):
  """Bit for bit, and every field that we write."""
  job = convert.Job(f"orbax:{run}", f"peft:{tmp_path}/out")
  convert.convert(job, check=True)
  assert f"adapters beside {GOLDEN}/base" in capsys.readouterr().out
  ours = safetensors.numpy.load_file(tmp_path / "out" / peft.WEIGHTS)
  theirs = held_by_peft()
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype
    assert ours[name].tobytes() == value.tobytes(), name
  fields = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  known = json.loads((THEIRS / peft.CONFIG).read_text())
  assert fields.pop("base_model_name_or_path") == f"{GOLDEN}/base"
  assert set(fields.pop("target_modules")) == set(known.pop("target_modules"))
  assert fields == {name: known[name] for name in fields}


def test_peft_in_another_dtype_and_without_a_place_for_the_base(
  tmp_path, capsys
):
  config, params, _ = hugging_face.read(GOLDEN / "base")
  store.write(tmp_path / "base", config, params, None)
  run = make_run(tmp_path / "run", f"orbax:{tmp_path}/base")
  job = convert.Job(f"orbax:{run}", f"peft:{tmp_path}/out", dtype="bfloat16")
  convert.convert(job, check=True)
  assert "note: PEFT takes a Hugging Face model" in capsys.readouterr().out
  tensors, rows = hugging_face.open_file(tmp_path / "out", peft.WEIGHTS)
  for name, value in held_by_peft().items():
    assert tensors[name].stored == "BF16"
    rounded = value.astype(ml_dtypes.bfloat16)
    assert rows(name, 0, len(value)).tobytes() == rounded.tobytes()
  named = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  base = f"orbax:{tmp_path}/base/checkpoints/0"
  assert named["base_model_name_or_path"] == base


def test_a_reward_model_upon_a_language_model(tmp_path):
  """The score is its own; what said words is left out."""
  config = checkpoint.read_config(f"hf:{GOLDEN}/base")
  scalar = dataclasses.replace(config, head="scalar")
  score = np.arange(24, dtype=np.float32)[:, None]
  params = tree() | {"score": {"kernel": score}}
  base = f"hf:{GOLDEN}/base"
  run = make_run(tmp_path / "run", base, params, config=scalar)
  whole = store.read_params(run)
  assert "head" not in whole
  np.testing.assert_array_equal(whole["score"]["kernel"], score)
  peft.write(tmp_path / "out", run, np.float32)
  written = safetensors.numpy.load_file(tmp_path / "out" / peft.WEIGHTS)
  name = "base_model.model.score.weight"
  np.testing.assert_array_equal(written[name], score.T)
  fields = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  assert fields["task_type"] == "SEQ_CLS"
  assert fields["modules_to_save"] == ["score"]


@pytest.fixture
def moved(tmp_path):
  """A run, its base beside it, both to be spoilt."""
  shutil.copytree(GOLDEN / "base", tmp_path / "base")
  return make_run(tmp_path / "run", f"hf:{tmp_path}/base")


@pytest.mark.parametrize(
  "changed",
  [
    "model.norm.weight",
    "model.embed_tokens.weight",
    # As where another LoRA run of it was merged.
    "model.layers.0.mlp.up_proj.weight",
  ],
)
def test_a_base_that_has_gone_or_changed(moved, tmp_path, changed):
  base = tmp_path / "base"
  base.rename(tmp_path / "elsewhere")
  for read in (store.open_tensors, store.read_params):
    with pytest.raises(
      errors.BadFileError,
      match=r"lora\.json: base=hf:.*/base does not exist.*bring the base back",
    ):
      read(moved)
  # What the message advises.
  file = moved / adapters.FILE
  fields = json.loads(file.read_text())
  fields["base"] = f"hf:{tmp_path}/elsewhere"
  file.write_text(json.dumps(fields))
  store.open_tensors(moved)
  weights_file = tmp_path / "elsewhere" / "model.safetensors"
  held = safetensors.numpy.load_file(weights_file)
  held[changed].reshape(-1)[5] += 1
  safetensors.numpy.save_file(held, weights_file)
  with pytest.raises(errors.BadFileError, match="holds other weights than"):
    store.read_params(moved)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"rank": 4}, r"lora_a is \[2, 24, 3\], but .* make it \[2, 24, 4\]"),
    ({"rank": 0}, r"lora\.rank=0"),
    ({"base": 3}, "must be texts"),
    ({"colour": "red"}, "colour"),
    (None, r"lora\.json: not what a LoRA run keeps"),
  ],
)
def test_a_damaged_record(moved, fields, message):
  file = moved / adapters.FILE
  whole = json.loads(file.read_text())
  file.write_text(json.dumps(whole | fields) if fields else "[1, 2")
  with pytest.raises(errors.BadFileError, match=message):
    store.open_tensors(moved)


def test_what_peft_cannot_have(run, moved, tmp_path):
  base, out = f"hf:{GOLDEN}/base", f"peft:{tmp_path}/out"
  config, params, _ = hugging_face.read(GOLDEN / "base")
  store.write(tmp_path / "whole", config, params, None)
  longer = dataclasses.replace(config, rope_theta=1e6)
  store.write_model(moved, longer, None)
  for job, message in (
    (convert.Job(base, out), "--src=hf:.* has none, give orbax:RUN"),
    (convert.Job(f"orbax:{tmp_path}/whole", out), "it is no LoRA run"),
    (convert.Job(f"orbax:{run}", out, dtype="q8_0"), "--dtype=q8_0"),
    (convert.Job(f"orbax:{moved}", out), r"another model\.rope_theta than"),
    (convert.Job(f"orbax:{run}", f"peft:{moved}"), "not an empty folder"),
  ):
    with pytest.raises(errors.UserError, match=message):
      convert.convert(job, check=True)
  assert not (tmp_path / "out").exists()


WITH_PEFT = """
import json, sys, peft, torch, transformers
ids = torch.tensor(json.loads(sys.argv[1]))
settings = {"dtype": torch.float32}
kind = peft.AutoPeftModelForCausalLM
if sys.argv[3] == "scalar":
  kind = peft.AutoPeftModelForSequenceClassification
  settings["num_labels"] = 1
model = kind.from_pretrained(sys.argv[2], **settings).eval()
if sys.argv[3] == "scalar":
  model.config.pad_token_id = model.base_model.model.config.pad_token_id = 0
with torch.no_grad():
  print(json.dumps(model(ids).logits.tolist()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  "PEER_PYTHON" not in os.environ, reason="needs a Python with peft"
)
@pytest.mark.parametrize("head", ["words", "scalar"])
def test_peft_loads_what_we_write(head, tmp_path):
  """Beside the base that it names, with our logits or rewards."""
  base = f"hf:{GOLDEN}/base"
  config = dataclasses.replace(checkpoint.read_config(base), head=head)
  params = tree()
  if head == "scalar":
    score = np.linspace(-1, 1, 24, dtype=np.float32)[:, None]
    params["score"] = {"kernel": score}
  run = make_run(tmp_path / "run", base, params, config=config)
  peft.write(tmp_path / "out", run, np.float32)
  ids = np.load(GOLDEN / "golden.npz")["ids"].astype(np.int32)
  command = ["-c", WITH_PEFT, json.dumps(ids.tolist()), tmp_path / "out", head]
  done = subprocess.run(
    [os.environ["PEER_PYTHON"], *command],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  theirs = np.array(json.loads(done.stdout.splitlines()[-1]))
  positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
  ours = decoder_lib.Decoder(config, attention="reference").apply(
    {"params": store.read_params(run)},
    ids,
    positions,
    np.ones_like(ids),
    method="rewards" if head == "scalar" else None,
  )
  ours = ours[:, -1:] if head == "scalar" else ours[0]
  np.testing.assert_allclose(ours, theirs, atol=2e-5)
