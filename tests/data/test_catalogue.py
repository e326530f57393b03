"""Texts of a dataset of tensorflow-datasets, read without TensorFlow."""

import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from llama_jax import errors, text
from llama_jax.data import catalogue, parts, preparation, prepared, records

TEXTS = ["first", "zwei ü", "", "last one"]


@pytest.fixture
def dataset(tmp_path):
  """A folder that tfds itself makes: texts, one of them no UTF-8."""
  folder = tmp_path / "mine"
  folder.mkdir()
  features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
  path = folder / "mine-train.array_record-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for one in [*TEXTS, b"\xff"]:
    writer.write(features.serialize_example({"body": one}))
  writer.close()
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    dataset_name="mine",
    split="train",
    filetype_suffix="array_record",
  )
  info = tfds.core.SplitInfo(
    name="train",
    shard_lengths=[len(TEXTS) + 1],
    num_bytes=path.stat().st_size,
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=[info], check_data=False
  )
  return folder


def test_texts_in_order(dataset):
  found = catalogue.Records(str(dataset), "train", "body", 100)
  assert len(found) == 5
  *good, bad = found
  assert good == TEXTS
  assert isinstance(bad, records.Bad) and bad.where == "example 4"
  short = catalogue.Records(str(dataset), "train", "body", 5)
  problems = [r for r in short if isinstance(r, records.Bad)]
  assert [p.where for p in problems] == [f"example {i}" for i in (1, 3, 4)]


def test_it_is_prepared_by_its_name(dataset, tmp_path, tokenizer_folder):
  source = parts.SourceConfig(str(dataset), "tfds", "body", "train")
  config = parts.PrepareConfig(
    tokenizer=str(tokenizer_folder),
    row_length=64,
    seed=0,
    heldout=0.0,
    infill_rate=0.0,
    bad_lines=1,
    max_document_mb=1.0,
    min_characters=1,
    max_characters=0,
    shard_mb=1.0,
    workers=1,
    sources={"mine": source},
  )
  report = preparation.prepare(config, tmp_path / "out")
  counted = report["sources"]["mine"]
  assert (counted["records"], counted["bad"], counted["filtered"]) == (5, 1, 1)
  row = prepared.read(tmp_path / "out").sources["mine"][0]
  tokenizer = text.load_tokenizer(tokenizer_folder)
  ids = row["tokens"][row["segments"] == 2].tolist()
  assert tokenizer.decode(ids) == "zwei ü"


def test_what_is_not_there(dataset, tmp_path):
  for name, split, field, said in (
    (str(dataset), "test", "body", "no split 'test'; it has train"),
    (str(dataset), "train", "text", "no feature 'text'; it has body"),
    (str(tmp_path), "train", "text", "is no dataset"),
    ("no_such_dataset", "train", "text", "is no dataset"),
    ("mnist", "train", "text", ""),
  ):
    with pytest.raises(errors.UserError) as caught:
      catalogue.Records(name, split, field, 100)
    assert said in str(caught.value) and "\n" not in str(caught.value)
