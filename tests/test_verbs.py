"""The verbs as a shell meets them: what they do, and how they refuse."""

import gc
import json
import subprocess
import sys
import textwrap
import weakref

import jax
import numpy as np
import pytest

from llama_jax import errors, text
from llama_jax.checkpoint import names, store
from llama_jax.model import sizes

NANO = sizes.get("nano")


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params, tokenizer_folder):
  """orbax: and hf: folders of a nano model that speaks."""
  folder = tmp_path_factory.mktemp("models")
  tokenizer = text.load_tokenizer(tokenizer_folder)
  params = random_params(NANO)
  store.write(folder / "orbax", NANO, params, tokenizer)
  store.write(folder / "mute", NANO, params, None)
  truncated = folder / "truncated.gguf"
  # A header that promises two tensors and ends.
  truncated.write_bytes(b"GGUF" + np.array([3, 2, 0, 5, 0], "<u4").tobytes())
  (folder / "text.jsonl").write_text('{"text": "def f(x): return x"}\n' * 3)
  (folder / "empty").mkdir()
  return folder


def one_line(result, *said):
  code, out, err = result
  assert code == 2, (out, err)
  assert err.startswith("error: ") and err.count("\n") == 1, err
  for words in said:
    assert words in err, err
  assert "Traceback" not in out + err


def check_all(run_verbs, cases):
  results = run_verbs(*(command for command, _ in cases.values()))
  for (name, (_, said)), result in zip(cases.items(), results, strict=True):
    print(name)
    one_line(result, *said)


def test_convert_refuses(run_verbs, model, tmp_path):
  def convert(src, dst):
    return ["llama_jax.convert", f"--src={src}", f"--dst={dst}"]

  taken = tmp_path / "taken"
  taken.mkdir()
  (taken / "mine.txt").write_text("mine")
  new, source = f"orbax:{tmp_path / 'new'}", f"orbax:{model / 'orbax'}"
  cases = {
    "truncated": (
      convert(f"gguf:{model / 'truncated.gguf'}", new),
      ("truncated.gguf",),
    ),
    "no gguf": (convert(f"gguf:{model / 'text.jsonl'}", new), ("text.jsonl",)),
    "nowhere": (convert("gguf:/no/where.gguf", new), ("/no/where.gguf",)),
    "no hf": (convert(f"hf:{model / 'empty'}", new), ("config.json",)),
    "no orbax": (
      convert(f"orbax:{model / 'empty'}", f"hf:{tmp_path / 'new'}"),
      ("is no checkpoint",),
    ),
    "scheme": (convert("safetensors:x", new), ("--src=", "gguf:PATH")),
    "no scheme": (convert(model / "orbax", new), ("--src=", "orbax:PATH")),
    "cannot write": (
      convert(source, "llama2c:x"),
      ("--dst=llama2c:x", "cannot be written", "hf:PATH"),
    ),
    "dtype": ([*convert(source, new), "--dtype=int3"], ("--dtype=int3",)),
    "quantised": ([*convert(source, new), "--dtype=q8_0"], ("gguf:",)),
    "memory": (
      [*convert(source, new), "--max_host_gb=0.5"],
      ("--max_host_gb=0.5", "1.5"),
    ),
    "shards": ([*convert(source, new), "--shard_gb=0"], ("--shard_gb=0",)),
    "model": ([*convert(source, new), "--model=x"], ("--model=x", "meta:")),
    "tokenizer": (
      [*convert(source, new), "--tokenizer=x"],
      ("--tokenizer=x", "of its own"),
    ),
    "taken": (convert(source, f"hf:{taken}"), ("taken", "not an empty")),
    "two things": (
      [*convert(source, new), f"--describe={source}"],
      ("--describe", "alone"),
    ),
    "no dst": (["llama_jax.convert", f"--src={source}"], ("--dst=",)),
    "no src": (["llama_jax.convert", f"--dst={new}"], ("--src=",)),
    "misspelt": ([*convert(source, new), "--ckpt=x"], ("ckpt",)),
  }
  check_all(run_verbs, cases)
  # Nothing half-written, nothing taken away.
  assert [p.name for p in tmp_path.iterdir()] == ["taken"]
  assert [p.name for p in taken.iterdir()] == ["mine.txt"]


def test_generate_refuses(run_verbs, model):
  def generate(*flags, ckpt=f"orbax:{model / 'orbax'}"):
    return ["llama_jax.generate", f"--ckpt={ckpt}", *flags]

  cases = {
    "long prompt": (
      generate("--prompt=" + "x y " * 300),
      ("context of 256", "shorten the prompt"),
    ),
    "long answer": (
      generate("--prompt=def", "--max_new_tokens=1000"),
      ("--max_new_tokens=1000", "context of 256", "or less"),
    ),
    "neither": (generate(), ("--prompt=TEXT, --chat",)),
    "both": (generate("--prompt=x", "--chat"), ("--prompt=TEXT, --chat",)),
    "top_p": (generate("--prompt=x", "--top_p=2"), ("--top_p=2",)),
    "temperature": (
      generate("--prompt=x", "--temperature=-1"),
      ("--temperature=-1",),
    ),
    "no checkpoint": (
      generate("--prompt=x", ckpt=f"orbax:{model / 'empty'}"),
      ("is no checkpoint",),
    ),
    "truncated": (
      generate("--prompt=x", ckpt=f"gguf:{model / 'truncated.gguf'}"),
      ("truncated.gguf",),
    ),
    "no ckpt": (["llama_jax.generate", "--prompt=x"], ("--ckpt",)),
    "mute": (
      generate("--prompt=x", ckpt=f"orbax:{model / 'mute'}"),
      ("no tokenizer",),
    ),
    "no template": (generate("--chat"), ("template",)),
    "stop": (generate("--prompt=x", "--stop=a", "--stop="), ("stop=",)),
  }
  check_all(run_verbs, cases)


def test_evaluate_refuses(run_verbs, model, tmp_path):
  out = tmp_path / "deep" / "out.json"
  sound = f"--text={model / 'text.jsonl'}"
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"text": "x"}\n{"text": "cut')

  def evaluate(*flags, ckpt=f"orbax:{model / 'orbax'}"):
    return ["llama_jax.evaluate", f"--ckpt={ckpt}", f"--out={out}", *flags]

  cases = {
    "task": (evaluate(sound, "--tasks=mmlu"), ("--tasks=mmlu", "perplexity")),
    "no text": (evaluate(), ("--text",)),
    "nowhere": (evaluate("--text=/no/where"), ("/no/where does not exist",)),
    "bad row": (evaluate(f"--text={bad}"), ("bad.jsonl, line 2",)),
    "window": (evaluate(sound), ("--window=1024", "context of 256")),
    "stride": (
      evaluate(sound, "--window=64", "--stride=65"),
      ("--stride=65",),
    ),
    "no checkpoint": (
      evaluate(sound, ckpt=f"hf:{model / 'empty'}"),
      ("config.json",),
    ),
    "mute": (
      evaluate(
        sound, "--window=64", "--stride=64", ckpt=f"orbax:{model / 'mute'}"
      ),
      ("no tokenizer",),
    ),
  }
  check_all(run_verbs, cases)
  assert not out.exists()


def test_the_verbs_do_their_work(run_verbs, model, tmp_path):
  """convert there and back, generate, evaluate: one after the other."""
  source, hf, back = (
    f"orbax:{model / 'orbax'}",
    f"hf:{tmp_path / 'hf'}",
    f"orbax:{tmp_path / 'back'}",
  )
  out = tmp_path / "out.json"
  talk = ["--prompt=def f(", "--max_new_tokens=12"]
  measure = [f"--text={model / 'text.jsonl'}", "--window=16", "--stride=16"]
  results = run_verbs(
    ["llama_jax.convert", f"--src={source}", f"--dst={hf}"],
    ["llama_jax.convert", f"--src={hf}", f"--dst={back}"],
    ["llama_jax.generate", f"--ckpt={source}", *talk],
    ["llama_jax.generate", f"--ckpt={back}", *talk],
    ["llama_jax.generate", f"--ckpt={hf}", *talk, "--temperature=1"],
    ["llama_jax.evaluate", f"--ckpt={back}", *measure, f"--out={out}"],
    ["llama_jax.convert", f"--describe={hf}"],
    [
      "llama_jax.convert",
      f"--src={hf}",
      f"--dst=orbax:{tmp_path / 'half'}",
      "--dtype=bfloat16",
    ],
  )
  assert [code for code, _, _ in results] == [0] * 8, results
  assert "preset       nano" in results[6][1]
  assert "rounded" in results[7][1] and "of the source" in results[7][1]
  assert "tensors" in results[0][1] and "forward" in results[0][1]
  # Bitwise there and back, and so the same words.
  first, second = (
    names.flatten(store.read_params(path))
    for path in (model / "orbax", tmp_path / "back")
  )
  for path, leaf in first.items():
    assert np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes()
  assert results[2][1].strip() and results[2][1] == results[3][1]
  assert results[4][1] != results[2][1]
  words = results[2][1].strip("\n")
  ((code, cut, _),) = run_verbs(
    ["llama_jax.generate", f"--ckpt={source}", *talk, f"--stop={words[2:4]}"]
  )
  assert code == 0 and cut == words[: words.index(words[2:4])] + "\n"
  written = json.loads(out.read_text())
  assert len(written["documents"]) == 3
  assert written["scored_tokens"] < written["tokens"]
  assert f"{written['mean_loss']:,.6g}" in results[5][1]


def test_three_lines_in_a_notebook(model, tokenizer_folder):
  import llama_jax

  llama = llama_jax.load(f"orbax:{model / 'orbax'}")
  assert llama.config == NANO
  ids = np.array([[1, 2, 3, 4, 5, 6]])
  logits = llama.logits(ids)
  assert logits.shape == (1, 6, 512) and logits.dtype == np.float32
  packed = llama.logits(
    ids, positions=[[0, 1, 2, 0, 1, 2]], segment_ids=[[1, 1, 1, 2, 2, 2]]
  )
  np.testing.assert_allclose(packed[:, :3], logits[:, :3], atol=1e-4)
  np.testing.assert_allclose(packed[:, 3:], llama.logits(ids[:, 3:]), atol=1e-4)
  one = llama.generate("def f(", max_new_tokens=4)
  both = llama.generate(["def f(", "return"], max_new_tokens=4)
  assert isinstance(one, str) and both[0] == one
  stop = one[1:3]
  cut = llama.generate(["def f("], max_new_tokens=4, stop=["\0", stop])
  assert cut == [one[: one.index(stop)]]
  # What only decodes is held once.
  held = {id(leaf) for leaf in jax.tree.leaves(llama.unrolled[1])}
  params = [weakref.ref(leaf) for leaf in jax.tree.leaves(llama.params)]
  llama.only_decode()
  gc.collect()
  left = [leaf() for leaf in params if leaf() is not None]
  assert held >= {id(leaf) for leaf in left}
  assert llama.generate("def f(", max_new_tokens=4) == one
  with pytest.raises(errors.UserError, match="only_decode"):
    llama.logits(ids)
  again = llama_jax.load_tokenizer(tokenizer_folder)
  assert again.decode(again.encode("def f(x):")) == "def f(x):"


def test_a_model_without_a_tokenizer_still_computes(model):
  import llama_jax

  mute = llama_jax.load(f"orbax:{model / 'mute'}")
  assert mute.tokenizer is None
  assert mute.logits([[1, 2]]).shape == (1, 2, 512)


@pytest.mark.parametrize("where", ["destructor", "collector", "plain"])
def test_ctrl_c_is_heeded_wherever_it_falls(where):
  """Python drops what is raised in a destructor or by its collector."""
  lines = f"""
    import gc, signal, time
    from llama_jax import shell
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press(*_):
      signal.raise_signal(signal.SIGINT)

    class Falling:
      __del__ = press

    def main(argv):
      if {where!r} == "destructor":
        Falling()
      elif {where!r} == "collector":
        gc.callbacks.append(lambda phase, _: phase == "start" and press())
        gc.collect()
      else:
        press()
      gc.callbacks.clear()
      for _ in range(600):
        time.sleep(0.1)
      print("went on")

    shell.run(main)
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(lines)],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 130, done.stderr
  assert done.stdout == ""
  assert done.stderr.strip() == "interrupted"
