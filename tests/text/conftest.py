"""What the tests of both tokenizer families ask."""

import pytest


@pytest.fixture
def assert_same():
  """assert_same(one, two, texts): the same ids and conventions."""

  def check(one, two, texts):
    for name in (
      "vocab_size",
      "bos_id",
      "eos_id",
      "add_bos",
      "stop_ids",
      "special_tokens",
      "named_tokens",
      "chat_template",
    ):
      assert getattr(one, name) == getattr(two, name), name
    assert one.encode_batch(texts) == two.encode_batch(texts)

  return check
