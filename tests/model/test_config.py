"""A config is checked once, where it is made, and says what is legal."""

import dataclasses
import json

import pytest

from llama_jax import errors
from llama_jax.model import config as config_lib
from llama_jax.model import sizes

NANO = sizes.get("nano")


@pytest.mark.parametrize(
  "change, named",
  [
    ({"vocab_size": 0}, "model.vocab_size=0"),
    ({"embed_dim": -4}, "model.embed_dim=-4"),
    ({"num_layers": 2.0}, "model.num_layers=2.0"),
    ({"context_length": True}, "model.context_length=True"),
    ({"mlp_dim": "8"}, "model.mlp_dim='8'"),
    ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide"),
    ({"head_dim": 7}, "model.head_dim=7 must be even"),
    ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
    ({"norm_eps": float("nan")}, "model.norm_eps=nan"),
    ({"rope_theta": -1.0}, "model.rope_theta=-1.0"),
    ({"head": "reward"}, "model.head='reward'"),
  ],
)
def test_refusals_name_the_knob_and_the_value(change, named):
  with pytest.raises(errors.ConfigError) as caught:
    dataclasses.replace(NANO, **change)
  assert named in str(caught.value)


@pytest.mark.parametrize(
  "fields, named",
  [
    (("llama3", 0.5, 1.0, 4.0, 8192), "factor=0.5"),
    (("llama3", float("inf"), 1.0, 4.0, 8192), "factor=inf"),
    (("llama3", 8.0, 4.0, 1.0, 8192), "low_freq_factor=4.0"),
    (("llama3", 8.0, 0.0, 4.0, 8192), "low_freq_factor=0.0"),
    (("llama3", 8.0, 1.0, None, 8192), "high_freq_factor=None"),
    (("llama3", 8.0, 1.0, 4.0, 0), "original_context=0"),
    (("llama3", 8.0, 1.0, 4.0, None), "original_context=None"),
    (("linear", float("nan"), None, None, None), "factor=nan"),
    (("linear", 4.0, 1.0, None, None), "low_freq_factor=1.0 must be None"),
    (("linear", 4.0, None, 4.0, None), "high_freq_factor=4.0 must be None"),
    (("linear", 4.0, None, None, 99), "original_context=99 must be None"),
    (("yarn", 4.0, None, None, None), "kind='yarn'"),
  ],
)
def test_scaling_refusals(fields, named):
  with pytest.raises(errors.ConfigError) as caught:
    config_lib.RopeScaling(*fields)
  assert f"model.rope_scaling.{named}" in str(caught.value)


LLAMA31 = config_lib.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
LINEAR = config_lib.RopeScaling("linear", 4.0, None, None, None)


def test_json_there_and_back():
  for scaling in (None, LLAMA31, LINEAR):
    config = dataclasses.replace(NANO, rope_scaling=scaling)
    fields = json.loads(config.to_json())
    assert config_lib.LlamaConfig.from_dict(fields) == config


def test_scalings_of_version_0_1_0_have_no_kind():
  config = dataclasses.replace(NANO, rope_scaling=LLAMA31)
  fields = dataclasses.asdict(config)
  del fields["rope_scaling"]["kind"]
  assert config_lib.LlamaConfig.from_dict(fields) == config


def test_models_of_before_there_were_reward_models_have_words():
  for head in config_lib.HEADS:
    config = dataclasses.replace(NANO, head=head)
    fields = json.loads(config.to_json())
    assert config_lib.LlamaConfig.from_dict(fields) == config
  del fields["head"]
  assert config_lib.LlamaConfig.from_dict(fields) == NANO


def test_unknown_and_missing_fields():
  fields = dataclasses.asdict(NANO)
  with pytest.raises(errors.ConfigError, match="rope_tetha"):
    config_lib.LlamaConfig.from_dict({**fields, "rope_tetha": 1.0})
  del fields["rope_theta"]
  with pytest.raises(errors.ConfigError, match="rope_theta"):
    config_lib.LlamaConfig.from_dict(fields)
  fields = dataclasses.asdict(dataclasses.replace(NANO, rope_scaling=LINEAR))
  fields["rope_scaling"]["beta_fast"] = 32
  with pytest.raises(errors.ConfigError, match=r"rope_scaling .*beta_fast"):
    config_lib.LlamaConfig.from_dict(fields)


def test_no_number_has_a_default():
  for cls in (config_lib.LlamaConfig, config_lib.RopeScaling):
    for field in dataclasses.fields(cls):
      if field.name == "head":  # the one that is no number
        continue
      assert field.default is dataclasses.MISSING, field.name
      assert field.default_factory is dataclasses.MISSING, field.name


def test_unknown_size_names_those_there_are():
  with pytest.raises(errors.ConfigError) as caught:
    sizes.get("smollm2-136m")
  assert all(name in str(caught.value) for name in sizes.SIZES)
