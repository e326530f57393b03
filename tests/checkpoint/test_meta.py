"""Meta's folders: there and back bitwise, Meta's own numbers, refusals."""

import dataclasses
import json
import pathlib
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from llama_jax import errors, llama, text
from llama_jax.checkpoint import (
  building,
  hugging_face,
  meta,
  meta_config,
  meta_params,
  names,
  proof,
  torch_draft,
  torch_zip,
  weights,
)
from llama_jax.model import config as config_lib
from llama_jax.model import rope, sizes

GOLDEN = pathlib.Path(__file__).parent / "golden"

BASE = config_lib.LlamaConfig(
  vocab_size=48,
  embed_dim=32,
  num_layers=2,
  num_heads=8,
  num_kv_heads=8,
  head_dim=4,
  mlp_dim=40,
  norm_eps=1e-5,
  rope_theta=1e4,
  rope_scaling=None,
  context_length=128,
  tied_embeddings=False,
)
SCALED = dataclasses.replace(
  BASE,
  rope_theta=5e5,
  rope_scaling=config_lib.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
  context_length=131072,
)
CONFIGS = {
  "all heads": (BASE, 8),
  "grouped": (dataclasses.replace(BASE, num_kv_heads=2), 2),
  "one kv head": (dataclasses.replace(BASE, num_kv_heads=1), 1),
  "tied": (dataclasses.replace(BASE, tied_embeddings=True), 8),
  "llama 3.2": (dataclasses.replace(SCALED, tied_embeddings=True), 8),
  "large vocabulary": (dataclasses.replace(BASE, vocab_size=40000), 8),
}


def random_params(config, dtype=np.float32):
  rng = np.random.default_rng(0)
  return names.nest(
    {
      row.path: rng.normal(size=names.our_shape(config, row)).astype(dtype)
      for row in names.rows(config)
    }
  )


def assert_bitwise(a, b):
  a, b = names.flatten(a), names.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype
    assert a[path].tobytes() == b[path].tobytes(), path


def archives(folder):
  return [torch_zip.Archive(path) for path in sorted(folder.glob("*.pth"))]


def save(path, tensors):
  """One file of arrays by name, as torch would save them."""
  known = {
    name: weights.Tensor(
      value.shape, value.dtype, weights.stored_as(value.dtype)
    )
    for name, value in tensors.items()
  }
  with torch_draft.Draft(path, known) as file:
    for name, value in tensors.items():
      file.append(name, np.ascontiguousarray(value))
    file.finish()


def load(path):
  """The arrays of one file by name."""
  archive = torch_zip.Archive(path)
  return {
    name: archive.rows(name, 0, view.shape[0])
    for name, view in archive.views.items()
  }


def edit(folder, **fields):
  """Replaces keys of params.json; a value of ... removes the key."""
  path = folder / "params.json"
  fields = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


@pytest.fixture
def folder(tmp_path):
  """A sound folder of two files, to be spoilt."""
  path = tmp_path / "model"
  meta.write(path, BASE, random_params(BASE), None, model_parallel=2)
  return path


# There and back.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("width", [1, 2, 8])
def test_there_and_back_is_bitwise(name, width, tmp_path):
  config, most = CONFIGS[name]
  params = random_params(config, ml_dtypes.bfloat16)
  settings = {"model_parallel": width, "block_bytes": 1000 * config.vocab_size}
  if width > most:
    with pytest.raises(errors.ConfigError, match=r"--model_parallel=.*; use 1"):
      meta.write(tmp_path / "m", config, params, None, **settings)
    assert not list(tmp_path.iterdir())
    return
  meta.write(tmp_path / "m", config, params, None, **settings)
  found, back, tokenizer = meta.read(tmp_path / "m")
  assert found == config == meta.read_config(tmp_path / "m")
  assert tokenizer is None
  assert_bitwise(back, params)
  assert len(archives(tmp_path / "m")) == width


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dtypes_stay(dtype, tmp_path):
  params = random_params(BASE, dtype)
  meta.write(tmp_path / "m", BASE, params, None, model_parallel=4)
  assert_bitwise(meta.read(tmp_path / "m")[1], params)


@pytest.mark.parametrize("block_bytes", [1, 500, 3000, 1 << 20])
def test_blocks_change_nothing(block_bytes, tmp_path):
  params = random_params(BASE)
  for path, size in (("a", weights.BLOCK_BYTES), ("b", block_bytes)):
    meta.write(
      tmp_path / path, BASE, params, None, model_parallel=2, block_bytes=size
    )
  for a in (tmp_path / "a").iterdir():
    assert a.read_bytes() == (tmp_path / "b" / a.name).read_bytes()


def test_every_part_is_where_metas_code_wants_it(tmp_path):
  """fairscale's layers: by rows, by columns, or whole."""
  config = dataclasses.replace(BASE, num_kv_heads=4)
  params = random_params(config)
  meta.write(tmp_path / "m", config, params, None, model_parallel=4)
  source = weights.from_params(config, params, "meta")
  for name in source.tensors:
    value = source.get(name)
    if value.ndim == 1:
      parts = [value] * 4
    elif name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")):
      parts = np.split(value, 4, axis=1)
    else:
      parts = np.split(value, 4, axis=0)
    for archive, part in zip(archives(tmp_path / "m"), parts, strict=True):
      found = archive.rows(name, 0, len(part))
      np.testing.assert_array_equal(found, part, name)


def test_a_tied_head_is_written_out(tmp_path):
  config = dataclasses.replace(BASE, tied_embeddings=True)
  meta.write(tmp_path / "m", config, random_params(config), None)
  tensors = load(tmp_path / "m" / "consolidated.00.pth")
  np.testing.assert_array_equal(
    tensors["output.weight"], tensors["tok_embeddings.weight"]
  )


def test_a_stopped_write_goes_on(tmp_path):
  params = random_params(BASE)
  meta.write(tmp_path / "whole", BASE, params, None, model_parallel=2)
  source = weights.from_params(BASE, params, "hf")
  job = {"job": 1}
  ticks = []

  def stop(unit, num_bytes):
    ticks.append(unit)
    if len(ticks) == 9:
      raise KeyboardInterrupt

  with (
    pytest.raises(KeyboardInterrupt),
    building.building(tmp_path / "m", job, stop) as site,
  ):
    meta.write_into(site, BASE, source, None, model_parallel=2)
  read = []
  counted = dataclasses.replace(
    source,
    rows=lambda name, *span: read.append(name) or source.rows(name, *span),
  )
  sizes_of = {}
  with building.building(
    tmp_path / "m", job, lambda *tick: sizes_of.update([tick])
  ) as site:
    assert len(site.done) == 9
    meta.write_into(site, BASE, counted, None, model_parallel=2)
  assert len(read) == len(source.tensors) - 9
  assert sum(sizes_of.values()) == sum(
    tensor.num_bytes for tensor in source.tensors.values()
  )
  for path in (tmp_path / "whole").iterdir():
    assert path.read_bytes() == (tmp_path / "m" / path.name).read_bytes()


# Meta's own code.


@pytest.mark.parametrize(
  ("name", "factor"), [("meta_one", None), ("meta_two", 8)]
)
def test_logits_are_those_of_metas_code(name, factor, tmp_path):
  """llama-models on one process and on two; what it wrote and computed."""
  shutil.copytree(GOLDEN / name, tmp_path / name)
  if factor:
    with pytest.raises(errors.BadFileError, match=r"factor .*--model=NAME"):
      meta.read(tmp_path / name)
    edit(tmp_path / name, rope_scaling_factor=factor)
  golden = np.load(GOLDEN / name / "golden.npz")
  config, params, _ = meta.read(tmp_path / name)
  ids = golden["ids"]
  ours = np.asarray(llama.Llama(config, params, None).logits([ids])[0])
  np.testing.assert_allclose(ours, golden["logits"], atol=1e-4)
  source = meta.open_tensors(tmp_path / name)[1]
  (reference,) = proof.reference_logits(config, source, ids)
  np.testing.assert_allclose(reference, golden["logits"], atol=1e-4)
  # A float32 angle of 9000 is good to 5e-4.
  turned = np.exp(1j * 9000 * rope.frequencies(config))
  np.testing.assert_allclose(turned, np.exp(1j * golden["angles"]), atol=2e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_what_meta_wrote_comes_back(width, tmp_path):
  shutil.copytree(GOLDEN / "meta_two", tmp_path / "m")
  edit(tmp_path / "m", rope_scaling_factor=8.0)
  config, source = meta.open_tensors(tmp_path / "m")
  with building.building(tmp_path / "back") as site:
    meta.write_into(site, config, source, None, model_parallel=width)
  back_config, back = meta.open_tensors(tmp_path / "back")
  assert back_config == config
  for name in source.tensors:
    assert source.get(name).tobytes() == back.get(name).tobytes()


def test_by_way_of_hugging_face(tmp_path):
  config, source = meta.open_tensors(GOLDEN / "meta_one")
  with building.building(tmp_path / "hf") as site:
    hugging_face.write_into(site, config, source, None)
  config, source = hugging_face.open_tensors(tmp_path / "hf")
  with building.building(tmp_path / "meta") as site:
    meta.write_into(site, config, source, None)
  before = load(GOLDEN / "meta_one" / "consolidated.00.pth")
  after = load(tmp_path / "meta" / "consolidated.00.pth")
  assert before.keys() == after.keys()
  for name, value in before.items():
    assert value.tobytes() == after[name].tobytes(), name


# params.json.

# As published (llama.com); n_kv_heads and the rest are absent where they were.
PUBLISHED = {
  "llama-7b": dict(
    dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-6,
    vocab_size=-1,
  ),
  "llama-33b": dict(
    dim=6656, multiple_of=256, n_heads=52, n_layers=60, norm_eps=1e-6,
    vocab_size=-1,
  ),
  "llama-65b": dict(
    dim=8192, multiple_of=256, n_heads=64, n_layers=80, norm_eps=1e-5,
    vocab_size=-1,
  ),
  "llama2-13b": dict(
    dim=5120, multiple_of=256, n_heads=40, n_layers=40, norm_eps=1e-5,
    vocab_size=-1,
  ),
  "llama2-70b": dict(
    dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64,
    n_kv_heads=8, n_layers=80, norm_eps=1e-5, vocab_size=-1,
  ),
  "codellama-7b": dict(
    dim=4096, n_layers=32, n_heads=32, multiple_of=256,
    ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1000000,
  ),
  "codellama-7b-python": dict(
    dim=4096, n_layers=32, n_heads=32, multiple_of=256,
    ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1000000,
  ),
  "codellama-34b": dict(
    dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, multiple_of=256,
    ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1000000,
  ),
  "codellama-70b-python": dict(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096,
    ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=10000,
  ),
  "llama3-8b": dict(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256,
    multiple_of=1024, ffn_dim_multiplier=1.3, norm_eps=1e-5,
    rope_theta=500000.0,
  ),
  "llama3.1-8b": dict(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256,
    multiple_of=1024, ffn_dim_multiplier=1.3, norm_eps=1e-5,
    rope_theta=500000.0, use_scaled_rope=True,
  ),
  "llama3.1-405b": dict(
    dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, vocab_size=128256,
    multiple_of=4096, ffn_dim_multiplier=1.2, norm_eps=1e-5,
    rope_theta=500000.0, use_scaled_rope=True,
  ),
  "llama3.2-1b": dict(
    dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256,
    multiple_of=256, ffn_dim_multiplier=1.5, norm_eps=1e-5,
    rope_theta=500000.0, use_scaled_rope=True,
  ),
  "llama3.2-3b": dict(
    dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, vocab_size=128256,
    multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5,
    rope_theta=500000.0, use_scaled_rope=True,
  ),
}  # fmt: skip


def resolved(folder, fields, preset, model=None):
  (folder / "params.json").write_text(json.dumps(fields))
  said = meta_params.read(folder)
  return meta_config.resolve(said, preset.vocab_size, preset.mlp_dim, model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_of_every_era(name, tmp_path):
  preset = sizes.get(name)
  assert resolved(tmp_path, PUBLISHED[name], preset) == preset
  assert resolved(tmp_path, PUBLISHED[name], preset, name) == preset


@pytest.mark.parametrize("name", sizes.SIZES)
def test_every_preset_is_said_again(name, tmp_path):
  """By Meta's rule for the width, and by nothing that Meta's code refuses."""
  preset = sizes.get(name)
  if preset.head_dim * preset.num_heads != preset.embed_dim:
    with pytest.raises(errors.ConfigError, match=r"model\.head_dim"):
      meta_params.write_fields(preset)
    return
  fields, ours = meta_params.write_fields(preset)
  assert resolved(tmp_path, fields, preset).tied_embeddings in (
    preset.tied_embeddings,
    False,
  )
  (tmp_path / "llama_jax.json").write_text(json.dumps(ours))
  assert resolved(tmp_path, fields, preset) == preset


@pytest.mark.parametrize("embed_dim", [8, 24, 96, 4096])
def test_every_width_can_be_said(embed_dim):
  for width in (*range(1, 40), 255, 257, 10919, 10923, 14336, 99999):
    multiple_of, multiplier = meta_params._rule(embed_dim, width)
    assert meta_params.mlp_dim(embed_dim, multiple_of, multiplier) == width


@pytest.mark.parametrize(
  ("fields", "context"),
  [
    ({"norm_eps": 1e-6}, 2048),
    ({"norm_eps": 1e-5}, 4096),
    ({"norm_eps": 1e-5, "rope_theta": 10000}, 4096),
    ({"norm_eps": 1e-5, "rope_theta": 1000000}, 16384),
    ({"norm_eps": 1e-5, "rope_theta": 500000.0}, 8192),
  ],
)
def test_shapes_that_no_preset_has(fields, context, tmp_path):
  fields = dict(dim=32, n_layers=2, n_heads=8, multiple_of=8) | fields
  config = resolved(tmp_path, fields, dataclasses.replace(BASE, mlp_dim=88))
  assert config.context_length == context
  assert config.rope_scaling is None
  assert not config.tied_embeddings


def test_a_shape_of_two_presets_is_not_guessed(tmp_path, monkeypatch):
  preset = sizes.get("llama3.1-8b")
  other = dataclasses.replace(
    preset, rope_scaling=sizes.get("llama3.2-1b").rope_scaling
  )
  monkeypatch.setitem(sizes.SIZES, "other-8b", other)
  fields = PUBLISHED["llama3.1-8b"]
  with pytest.raises(errors.BadFileError, match=r"llama3\.1-8b or other-8b"):
    resolved(tmp_path, fields, preset)
  assert resolved(tmp_path, fields, preset, "other-8b") == other
  said = fields | {"rope_scaling_factor": 32}
  assert resolved(tmp_path, said, preset) == other


def test_model_must_be_the_one(tmp_path):
  preset = sizes.get("llama2-7b")
  fields = PUBLISHED["llama-7b"] | {"norm_eps": 1e-5}
  with pytest.raises(errors.ConfigError) as caught:
    resolved(tmp_path, fields, preset, "llama3.1-8b")
  for part in (
    "--model=llama3.1-8b",
    "model.vocab_size=32000 and not 128256",
    "model.rope_theta=10000.0 and not 500000.0",
    "use_scaled_rope=False",
  ):
    assert part in str(caught.value)
  with pytest.raises(errors.ConfigError, match="not known"):
    resolved(tmp_path, fields, preset, "llama9-1b")
  assert resolved(tmp_path, fields, preset, "Llama-2-7b-chat") == preset


# Tied or not.


def test_a_tied_preset_and_equal_bytes(tmp_path, monkeypatch):
  """As Llama 3.2 1B and 3B are published."""
  preset = dataclasses.replace(SCALED, tied_embeddings=True)
  monkeypatch.setitem(sizes.SIZES, "tiny", preset)
  path = tmp_path / "m"
  meta.write(path, preset, random_params(preset), None, model_parallel=2)
  (path / "llama_jax.json").unlink()
  edit(path, rope_scaling_factor=...)
  assert meta.read(path)[0] == preset
  assert meta.read(path, "tiny")[0] == preset

  file = path / "consolidated.01.pth"
  tensors = load(file)
  tensors["output.weight"][-1, -1] += 1  # the last number there is
  save(file, tensors)
  config, params, _ = meta.read(path)
  assert config == dataclasses.replace(preset, tied_embeddings=False)
  assert "head" in params
  with pytest.raises(errors.BadFileError, match="declared tied"):
    meta.read(path, "tiny")


def test_a_head_that_is_left_out_is_the_embedding(tmp_path):
  meta.write(tmp_path / "m", BASE, random_params(BASE), None)
  file = tmp_path / "m" / "consolidated.00.pth"
  tensors = load(file)
  tensors.pop("output.weight")
  save(file, tensors)
  with pytest.raises(errors.BadFileError, match=r"lacks .*output\.weight"):
    meta.read(tmp_path / "m")
  (tmp_path / "m" / "llama_jax.json").unlink()
  assert meta.read(tmp_path / "m")[0].tied_embeddings


# Files that do not fit each other.


def test_kv_heads_that_several_files_hold(folder):
  """Eight files of four heads, each head in two of them."""
  grouped = dataclasses.replace(BASE, num_kv_heads=4)
  params = random_params(grouped)
  shutil.rmtree(folder)
  meta.write(folder, grouped, params, None, model_parallel=4)
  four = [load(path) for path in sorted(folder.glob("*.pth"))]
  for rank in range(8):
    tensors = {}
    for name, value in four[rank // 2].items():
      half = slice(rank % 2 * len(value) // 2, (rank % 2 + 1) * len(value) // 2)
      if name.endswith(("wk.weight", "wv.weight")) or value.ndim == 1:
        tensors[name] = value
      elif name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")):
        tensors[name] = np.split(value, 2, axis=1)[rank % 2]
      else:
        tensors[name] = value[half]
    save(folder / f"consolidated.{rank:02d}.pth", tensors)
  config, found, _ = meta.read(folder)
  assert config == grouped
  assert_bitwise(found, params)

  name = "layers.1.attention.wk.weight"
  tensors[name] = tensors[name] + 1
  save(folder / "consolidated.07.pth", tensors)
  with pytest.raises(errors.BadFileError, match=rf"{name} should be the same"):
    meta.read(folder)


def spoil(name, change):
  """Changes one tensor of the second file."""

  def act(folder):
    file = folder / "consolidated.01.pth"
    tensors = load(file)
    tensors[name] = change(tensors[name])
    save(file, {k: v for k, v in tensors.items() if v is not None})

  return act


@pytest.mark.parametrize(
  ("act", "message"),
  [
    (spoil("norm.weight", lambda x: x + 1), r"norm\.weight should be the same"),
    (spoil("norm.weight", lambda x: None), r"norm\.weight is in one of them"),
    (
      spoil("norm.weight", lambda x: x[:-1]),
      r"F32 \[32\] in the one, F32 \[31\]",
    ),
    (
      spoil("output.weight", lambda x: x.astype(np.float16)),
      r"F32 \[24, 32\] in the one, F16",
    ),
    (lambda f: (f / "consolidated.00.pth").unlink(), "without a gap"),
    (
      lambda f: (f / "consolidated.01.pth").unlink(),
      r"one of 2 files .* and 1 are there",
    ),
    (
      lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"),
      "without a gap",
    ),
    (
      lambda f: (f / "consolidated.01.pth").write_bytes(b"not a zip"),
      r"consolidated\.01\.pth is no zip",
    ),
    (lambda f: (f / "params.json").unlink(), "params.json"),
    (
      lambda f: shutil.copy(
        f / "consolidated.00.pth", f / "consolidated.02.pth"
      ),
      r"one of 2 files .* and 3 are there",
    ),
  ],
)
def test_parts_that_do_not_fit(act, message, folder):
  act(folder)
  with pytest.raises(errors.BadFileError, match=message):
    meta.read(folder)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"dim": ...}, "lacks dim"),
    ({"dim": 31}, "n_heads=8 does not divide"),
    ({"dim": 64}, r"dim=64, but .*wq\.weight is \[16, 32\]"),
    ({"dim": "32"}, "dim='32'"),
    ({"dim": True}, "dim=True"),
    ({"dim": 32.0}, r"dim=32\.0"),
    ({"n_heads": 0}, "n_heads=0"),
    ({"n_heads": 10**30}, "n_heads=1000"),
    ({"n_heads": 16}, r"wq|wk|num_heads"),
    ({"n_kv_heads": 4}, r"wk\.weight is \[32, 32\].*num_kv_heads=4"),
    ({"n_kv_heads": 3}, "num_kv_heads=3"),
    ({"n_layers": 10**9}, r"layers\.2\..*num_layers=1000000000"),
    ({"n_layers": 1}, "beyond model.num_layers=1"),
    ({"vocab_size": 47}, "vocab_size=47, but the embedding has 48"),
    ({"vocab_size": -2}, "vocab_size=-2"),
    ({"multiple_of": 256}, "40 wide"),
    ({"ffn_dim_multiplier": 2}, "make w1"),
    ({"ffn_dim_multiplier": 10**400}, "ffn_dim_multiplier"),
    ({"ffn_dim_multiplier": 1e300, "dim": 2**39}, "ffn_dim_multiplier"),
    ({"norm_eps": ...}, "lacks norm_eps"),
    ({"norm_eps": 0}, "norm_eps=0"),
    ({"norm_eps": "1e-5"}, "norm_eps='1e-5'"),
    ({"rope_theta": -1}, "rope_theta=-1"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"use_scaled_rope": True}, "rope_scaling_factor"),
    ({"use_scaled_rope": "yes"}, "use_scaled_rope='yes'"),
    ({"use_scaled_rope": True, "rope_scaling_factor": 0.5}, "factor=0.5"),
    ({"use_scaled_rope": True, "rope_high_freq_factor": 2}, "high_freq"),
    ({"quantization_args": {"group_size": 32}}, "'quantization_args'"),
    ({"vision_chunk_size": 448}, "'vision_chunk_size'"),
    ({"moe_args": {}}, "'moe_args'"),
  ],
)
def test_params_that_are_no_llamas_or_not_of_these_weights(
  fields, message, folder
):
  edit(folder, **fields)
  with pytest.raises(errors.BadFileError, match=message):
    meta.read(folder)


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"[]",
    b"[" * 200_000,
    b'{"dim": 1, "dim": 2}',
    b"\xff\xfe",
    b'{"dim": ' + b"9" * 5000 + b"}",
    b'{"dim": NaN}',
    b" " * (17 << 20),
  ],
)
@pytest.mark.parametrize("name", ["params.json", "llama_jax.json"])
def test_hostile_json(content, name, folder):
  (folder / name).write_bytes(content)
  with pytest.raises(errors.BadFileError, match=name):
    meta.read(folder)


def test_links_stay_in_the_folder_or_its_cache(folder):
  file = folder / "consolidated.00.pth"
  file.rename(folder.parent / "elsewhere")
  file.symlink_to("../elsewhere")
  with pytest.raises(errors.BadFileError, match="outside the folder"):
    meta.read(folder)

  # models--x/snapshots/REVISION/original/ and models--x/blobs/.
  cache = folder.parent / "cache"
  snapshot = cache / "snapshots" / "c0ffee"
  snapshot.mkdir(parents=True)
  (cache / "blobs").mkdir()
  (folder.parent / "elsewhere").rename(cache / "blobs" / "0a1b")
  original = folder.rename(snapshot / "original")
  (original / "consolidated.00.pth").unlink()
  (original / "consolidated.00.pth").symlink_to("../../../blobs/0a1b")
  assert meta.read(original)[0] == BASE
  (original / "params.json").rename(folder.parent / "params.json")
  (original / "params.json").symlink_to(folder.parent / "params.json")
  with pytest.raises(errors.BadFileError, match="outside the folder"):
    meta.read(original)


def test_what_is_no_folder(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  for path in (tmp_path / "absent", folder / "params.json", tmp_path / "empty"):
    with pytest.raises(errors.BadFileError):
      meta.read(path)
  for path in folder.glob("*.pth"):
    path.unlink()
  with pytest.raises(errors.BadFileError, match=r"no consolidated\.00\.pth"):
    meta.read(folder)


@pytest.mark.parametrize(
  "count", [200, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_mutants_give_one_kind_of_error(count, folder):
  """A mutant may be sound: a key that nobody reads, a value that fits."""
  file = folder / "params.json"
  whole = file.read_bytes()
  rng = np.random.default_rng(2)
  refused = 0
  tracemalloc.start()
  for _ in range(count):
    mutant = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
      where = int(rng.integers(len(whole)))
      kind = rng.integers(3)
      if kind == 0:
        mutant[where] ^= 1 << rng.integers(8)
      elif kind == 1:
        mutant[where : where + 4] = rng.bytes(4)
      else:
        digits = b'0123456789{}[]",:.-e/\\'
        mutant[where] = digits[rng.integers(len(digits))]
    file.write_bytes(mutant)
    try:
      meta.open_tensors(folder)
    except errors.BadFileError:
      refused += 1
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert refused > count // 2
  assert peak < 64 << 20


# What cannot be written.


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"head_dim": 6}, r"model\.head_dim=6 .*write hf: or gguf:"),
    (
      {"rope_scaling": config_lib.RopeScaling("linear", 2.0, None, None, None)},
      r"model\.rope_scaling=.*write hf:",
    ),
    (
      {"rope_scaling": config_lib.RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)},
      r"original_context=8192",
    ),
  ],
)
def test_what_params_json_cannot_say(fields, message, tmp_path):
  config = dataclasses.replace(BASE, **fields)
  with pytest.raises(errors.ConfigError, match=message):
    meta.write(tmp_path / "m", config, random_params(config), None)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [0, -1, 3, 16, 1000])
def test_widths_that_do_not_divide(width, tmp_path):
  with pytest.raises(errors.ConfigError, match=r"use 1, 2, 4, 8\."):
    meta.write(
      tmp_path / "m", BASE, random_params(BASE), None, model_parallel=width
    )
  assert not list(tmp_path.iterdir())


def test_the_tokenizer_travels(tmp_path):
  words = ["<unk>", "<s>", "</s>", *"abcd", "<|im_end|>"]
  tokenizer = text.from_gguf_metadata(
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": words,
      "tokenizer.ggml.token_type": [3 if "<" in w else 1 for w in words],
      "tokenizer.ggml.merges": [],
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
    }
  )
  meta.write(tmp_path / "m", BASE, random_params(BASE), tokenizer)
  back = meta.read(tmp_path / "m")[2]
  assert back.encode("abba") == tokenizer.encode("abba")
  assert back.stop_ids == tokenizer.stop_ids

  small = dataclasses.replace(BASE, vocab_size=4)
  with pytest.raises(errors.BadFileError, match="8 ids"):
    meta.write(tmp_path / "small", small, random_params(small), tokenizer)
  meta.write(tmp_path / "small", small, random_params(small), None)
  tokenizer.save(tmp_path / "small")
  with pytest.raises(errors.BadFileError, match="8 ids"):
    meta.read(tmp_path / "small")


def test_a_chat_models_folder_gets_its_familys_template(tmp_path, monkeypatch):
  """Meta's folders hold none: the folder's name, or --model, says chat."""
  from llama_jax.model import sizes
  from llama_jax.text import folder as text_folder
  from llama_jax.text import sentencepiece_bpe, templates, train_sentencepiece

  lines = [f"a line of text, number {n}, and another word" for n in range(200)]
  content = train_sentencepiece.train(iter(lines), 300)
  tokenizer = sentencepiece_bpe.from_model(
    content, "t", text_folder.read_settings(tmp_path)
  )
  config = dataclasses.replace(
    sizes.get("nano"), head_dim=16, vocab_size=tokenizer.vocab_size
  )
  monkeypatch.setitem(sizes.SIZES, "llama2-tiny", config)
  params = {
    row.path: np.zeros(names.our_shape(config, row), np.float32)
    for row in names.rows(config)
  }
  for name in ("tiny-chat", "tiny"):
    meta.write(tmp_path / name, config, names.nest(params), None)
    (tmp_path / name / "tokenizer.model").write_bytes(content)
  assert meta.read_tokenizer(tmp_path / "tiny").chat_template is None
  for found in (
    meta.read_tokenizer(tmp_path / "tiny-chat"),
    meta.read_tokenizer(tmp_path / "tiny", "llama2-tiny-chat"),
  ):
    assert found.chat_template == templates.TEMPLATES["llama2"]
