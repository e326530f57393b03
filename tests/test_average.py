"""The mean of checkpoints: exact to one rounding, in little memory."""

import dataclasses
import fractions
import json

import ml_dtypes
import numpy as np
import pytest

from llama_jax import average, checkpoint, errors, text
from llama_jax.checkpoint import gguf, hugging_face, names, steps, store
from llama_jax.checkpoint import weights as weights_lib
from llama_jax.model import sizes

NANO = dataclasses.replace(sizes.get("nano"), head_dim=16)
BF16 = np.dtype(ml_dtypes.bfloat16)


def cast(params, dtype):
  return names.nest(
    {path: leaf.astype(dtype) for path, leaf in names.flatten(params).items()}
  )


def leaves(params):
  return {
    path: np.asarray(leaf) for path, leaf in names.flatten(params).items()
  }


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
  return text.load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def trained(random_params):
  """Params of four steps, NaN-free, of very different sizes."""
  return {
    step: random_params(NANO, seed=step, spread=10.0 ** (step // 50))
    for step in (50, 100, 150, 200)
  }


@pytest.fixture(scope="module")
def run(tmp_path_factory, trained, tokenizer):
  folder = tmp_path_factory.mktemp("run")
  store.write_model(folder, NANO, tokenizer)
  with steps.Checkpoints(folder, keep=9) as checkpoints:
    for step, params in trained.items():
      checkpoints.save(step, params, {"n": np.ones(3, "f4")}, {"step": step})
  return folder


def mean_of(trees, shares, dtype=np.float32):
  """The plain way, in float64; bfloat16 by way of exact fractions."""
  found = {}
  for path in leaves(trees[0]):
    total = sum(
      share * leaves(tree)[path].astype(np.float64)
      for tree, share in zip(trees, shares, strict=True)
    )
    found[path] = total.astype(dtype) if dtype != BF16 else to_bf16(total)
  return found


def to_bf16(value):
  """The nearest bfloat16, ties to even, by the bits of float64."""
  bits = value.view(np.uint64)
  cut = np.uint64(52 - 7)
  half = np.uint64(1) << (cut - np.uint64(1))
  low = bits & ((np.uint64(1) << cut) - np.uint64(1))
  kept = bits >> cut
  up = (low > half) | ((low == half) & (kept & np.uint64(1) == 1))
  kept = (kept + up) << cut
  return kept.view(np.float64).astype(BF16)  # exact


def run_average(ckpts, destination, weights=(), **settings):
  sources = average.resolve(ckpts)
  shares = average.shares_of(weights, sources)
  average.average(average.Job(sources, shares, destination, **settings))


@pytest.mark.parametrize("scheme", checkpoint.WRITES)
@pytest.mark.parametrize("dtype", ["", "bfloat16", "float16"])
def test_equals_the_plain_mean(run, trained, tmp_path, scheme, dtype):
  """Bitwise, in each format that can be written."""
  given = [f"{run}:steps=50,150-200"]
  destination = f"{scheme}:{tmp_path / 'mean'}"
  run_average(given, destination, ["0.2", "0.3", "0.5"], dtype=dtype)
  config, params, tokenizer = checkpoint.load(destination)
  assert config == NANO and tokenizer.encode("def f(x):")
  trees = [trained[step] for step in (50, 150, 200)]
  wanted = {"": np.dtype("f4"), "bfloat16": BF16, "float16": np.dtype("f2")}
  want = mean_of(trees, (0.2, 0.3, 0.5), wanted[dtype])
  for path, leaf in leaves(params).items():
    if scheme == "gguf":  # keeps norms in float32; nothing is lost
      leaf = leaf.astype(want[path].dtype)
    assert leaf.dtype == want[path].dtype
    assert leaf.tobytes() == want[path].tobytes(), path


def test_the_mean_of_one_is_that_one(run, trained, tmp_path):
  for number, given in enumerate(
    (f"{run}:steps=100", f"{run}", f"orbax:{run}")
  ):
    run_average([given], f"orbax:{tmp_path / str(number)}")
    back = leaves(store.read_params(tmp_path / str(number)))
    for path, leaf in leaves(trained[100 if not number else 200]).items():
      assert back[path].tobytes() == leaf.tobytes()
  said = (tmp_path / "0" / average.RECORD).read_text()
  assert said == f"1.000000  orbax:{run / 'checkpoints' / '100'}\n"


def test_many_of_the_same_are_that_one(tmp_path, random_params):
  """Thirds add up to one, whatever float64 makes of them."""
  params = cast(random_params(NANO), BF16)
  folders = [tmp_path / name for name in "abc"]
  for folder in folders:
    store.write(folder, NANO, params, None)
  run_average([f"orbax:{f}" for f in folders], f"hf:{tmp_path / 'mean'}")
  for path, leaf in leaves(hugging_face.read(tmp_path / "mean")[1]).items():
    assert leaf.dtype == BF16
    assert leaf.tobytes() == leaves(params)[path].tobytes()


def test_formats_and_dtypes_mix(tmp_path, random_params, tokenizer):
  """Across RoPE layouts; of two dtypes the mean is float32."""
  one, two = random_params(NANO, seed=1), cast(random_params(NANO, 2), BF16)
  gguf.write(tmp_path / "one.gguf", NANO, one, tokenizer)
  store.write(tmp_path / "two", NANO, two, None)
  run_average(
    [f"gguf:{tmp_path}/one.gguf", f"orbax:{tmp_path}/two"],
    f"hf:{tmp_path}/mean",
    ["3", "1"],
  )
  _, params, words = hugging_face.read(tmp_path / "mean")
  assert words.vocab_size == tokenizer.vocab_size
  want = mean_of([one, two], (0.75, 0.25))
  for path, leaf in leaves(params).items():
    assert leaf.tobytes() == want[path].tobytes(), path


def test_rounded_once():
  """A value just above the middle of two bfloat16s: float32 would take it for
  the middle, and bfloat16 then for the lower. So does ml_dtypes 0.5."""
  middle = 1 + 2.0**-8
  value = np.array([middle + 2.0**-40, middle, middle - 2.0**-40])
  value = np.concatenate([value, -value, [0.0, -0.0, np.nan, np.inf, 1e-60]])
  found = average._to_odd(value).astype(BF16)
  assert (
    found.tobytes()
    == np.array(
      [1 + 2.0**-7, 1, 1, -1 - 2.0**-7, -1, -1, 0.0, -0.0, np.nan, np.inf, 0.0]
    )
    .astype(BF16)
    .tobytes()
  )
  twice = value.astype(np.float32).astype(BF16)
  assert twice.tobytes() != found.tobytes()  # or _to_odd could go
  # Against exact arithmetic: the nearest of the neighbours.
  rng = np.random.default_rng(0)
  for one in rng.normal(size=300) * 10.0 ** rng.integers(-30, 30, 300):
    got = average._to_odd(np.array([one])).astype(BF16)[0]
    distance = abs(fractions.Fraction(float(got)) - fractions.Fraction(one))
    bits = np.array([got]).view(np.uint16)
    for step in (1, -1):
      other = float((bits + np.uint16(step % 2**16)).view(BF16)[0])
      assert distance <= abs(
        fractions.Fraction(other) - fractions.Fraction(one)
      )


def test_names_of_checkpoints(run, tmp_path):
  inside = f"orbax:{run}/checkpoints"
  for given, wanted in (
    ([str(run)], [200]),
    ([f"orbax:{run}:steps=150,50"], [150, 50]),
    ([f"{run}:steps=60-160"], [100, 150]),
    ([f"{run}:steps=200,0-100"], [200, 50, 100]),
    ([f"{run}:steps=50", f"{run}/checkpoints/100"], [50, 100]),
  ):
    found = average.resolve(given)
    assert list(found) == [f"{inside}/{step}" for step in wanted]
  for given, said in (
    ([f"{run}:steps=60"], r"no step 60; there are 50, 100, 150, 200"),
    ([f"{run}:steps=60-70"], "no step 60-70"),
    ([f"{run}:steps=50,x"], "'x' is no step"),
    ([f"{run}:steps="], "'' is no step"),
    ([f"{run}:steps=-5"], "'-5' is no step"),
    ([f"{run}:steps=50,0-100"], "50 twice"),
    (["hf:x:steps=3"], r"hf: holds one checkpoint; leave out :steps=3"),
    ([f"{tmp_path}/nowhere"], "does not exist"),
  ):
    with pytest.raises(errors.UserError, match=said):
      average.resolve(given)


def test_weights_are_divided_by_their_sum():
  assert average.shares_of([], "abcd") == (0.25,) * 4
  assert average.shares_of(["0.2", "0.3", "0.5"], "abc") == (0.2, 0.3, 0.5)
  assert average.shares_of(["1", "0", "3"], "abc") == (0.25, 0.0, 0.75)
  for given in (["1"], ["1", "-1"], ["0", "0"], ["nan", "1"], ["a", "1"]):
    with pytest.raises(errors.UserError, match="--weights="):
      average.shares_of(given, ["orbax:a", "orbax:b"])


def test_models_that_do_not_fit(tmp_path, random_params, tokenizer):
  other = dataclasses.replace(NANO, mlp_dim=96)
  theta = dataclasses.replace(NANO, rope_theta=5e5)
  store.write(tmp_path / "a", NANO, random_params(NANO), tokenizer)
  store.write(tmp_path / "b", other, random_params(other), None)
  store.write(tmp_path / "c", theta, random_params(theta), None)
  store.write(tmp_path / "d", NANO, random_params(NANO), tokenizer)
  file = tmp_path / "d" / "tokenizer" / "tokenizer.json"
  fields = json.loads(file.read_text())
  vocabulary = fields["model"]["vocab"]
  a, b = vocabulary["a"], vocabulary["b"]
  vocabulary |= {"a": b, "b": a}
  file.write_text(json.dumps(fields))
  for name, said in (
    ("b", r"model\.mlp_dim is 192 in orbax:.*a.* and 96 in orbax:.*b"),
    ("c", r"model\.rope_theta is"),
    ("d", "the tokenizers of"),
  ):
    given = [f"orbax:{tmp_path}/a", f"orbax:{tmp_path}/{name}"]
    with pytest.raises(errors.UserError, match=said):
      run_average(given, f"orbax:{tmp_path}/mean")
  for settings, said in (
    ({"dtype": "int8"}, "--dtype=int8"),
    ({"max_host_gb": 1}, "--max_host_gb=1"),
  ):
    with pytest.raises(errors.UserError, match=said):
      run_average([f"orbax:{tmp_path}/a"], f"orbax:{tmp_path}/m", **settings)
  for destination in ("llama2c:x", f"orbax:{tmp_path}/a", "nowhere"):
    with pytest.raises(errors.UserError, match=r"--dst|is not an empty"):
      run_average([f"orbax:{tmp_path}/a"], destination)
  kept = sorted(p.name for p in tmp_path.iterdir())
  assert kept == ["a", "b", "c", "d"]


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
  import shutil

  shutil.copytree(run, tmp_path / "run")
  step = tmp_path / "run" / "checkpoints" / "100"
  file = max(
    (p for p in (step / "params").rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  content = bytearray(file.read_bytes())
  content[9999] ^= 2
  file.write_bytes(content)
  with pytest.raises(errors.BadFileError, match=file.name):
    run_average([f"{tmp_path}/run:steps=50-200"], f"hf:{tmp_path}/mean")
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


class Stop(BaseException):
  """What no writer catches, as a kill."""


def test_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
  """What was finished is not read again, and the bits are the same."""
  given = [f"{run}:steps=50-200"]
  run_average(given, f"hf:{tmp_path}/whole")
  opened = checkpoint.open_tensors
  reads, limit = [], [20]

  def counting(reference, knob):
    config, source = opened(reference, knob)

    def rows(name, start, stop):
      if len(reads) == limit[0]:
        raise Stop
      reads.append(name)
      return source.rows(name, start, stop)

    return config, dataclasses.replace(source, rows=rows)

  monkeypatch.setattr(checkpoint, "open_tensors", counting)
  with pytest.raises(Stop):
    run_average(given, f"hf:{tmp_path}/mean")
  assert not (tmp_path / "mean").exists()
  first = set(reads)
  reads.clear()
  limit[0] = -1
  run_average(given, f"hf:{tmp_path}/mean")
  assert first - set(reads)
  for file in (tmp_path / "whole").rglob("*"):
    if file.is_file():
      again = tmp_path / "mean" / file.relative_to(tmp_path / "whole")
      assert again.read_bytes() == file.read_bytes()


def test_memory_is_bounded(tmp_path, random_params):
  """A model four times larger takes no more; a leaf alone is larger than what
  is held of all checkpoints."""
  import tracemalloc

  peaks = []
  for vocab_size in (16384, 65536):
    config = dataclasses.replace(NANO, vocab_size=vocab_size)
    folder = tmp_path / str(vocab_size)
    for name in "ab":
      store.write(folder / name, config, random_params(config), None)
    given = average.resolve([f"orbax:{folder}/a", f"orbax:{folder}/b"])
    _, sources, _ = average._open(given)
    result = average.mean(config, sources, (0.5, 0.5), BF16)
    tracemalloc.start()
    for _ in weights_lib.read_ahead(
      result, result.spans(result.tensors, 100_000)
    ):
      pass
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # How many blocks are on their way hangs on the threads' pace.
  assert peaks[1] < 2 * peaks[0]
  assert peaks[1] < 65536 * NANO.embed_dim * 2  # the embedding as bfloat16


def test_the_verb(run_verbs, run, tmp_path):
  mistakes = {
    "--ckpts=REF is needed": [],
    "--dst=SCHEME:PATH is needed": [f"--ckpts={run}"],
    "--weights=1,2 has 2 numbers for 1": [
      f"--ckpts={run}",
      "--dst=orbax:x",
      "--weights=1,2",
    ],
  }
  done, *others = run_verbs(
    [
      "llama_jax.average",
      f"--ckpts={run}:steps=50,100",
      f"--ckpts={run}:steps=200",
      f"--dst=hf:{tmp_path}/mean",
      "--weights=1,1,2",
      "--dtype=bfloat16",
    ],
    *(["llama_jax.average", *flags] for flags in mistakes.values()),
  )
  code, out, err = done
  assert code == 0, err
  assert "0.250000  orbax:" in out and "0.500000" in out
  assert "the mean of 3 checkpoints" in out
  assert (tmp_path / "mean" / "model.safetensors").exists()
  for said, (code, out, err) in zip(mistakes, others, strict=True):
    assert code == 2 and err.startswith("error: ") and said in err, out + err
    assert err.count("\n") == 1
