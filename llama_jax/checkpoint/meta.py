"""Llama weights as Meta publishes them: consolidated.NN.pth and params.json.

Reads and writes any number of files among which the model is shared out
(meta_parallel.py), without torch and without unpickling (torch_pickle.py).
What params.json leaves open is decided in meta_config.py. bfloat16, float16
and float32 tensors keep their dtype.

Meta's files hold a head even where it is the embedding. It is taken as tied
if llama_jax.json, --model or the preset of the shape says that it is, and in
the last case only if the bytes are the same.

Nothing outside the folder is opened, except where a Hugging Face cache keeps
the files of a snapshot.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax import errors, text
from llama_jax.checkpoint import (
  building,
  meta_config,
  meta_parallel,
  meta_params,
  names,
  proof,
  torch_draft,
  torch_zip,
  weights,
)
from llama_jax.model import config as config_lib
from llama_jax.model import sizes
from llama_jax.text import files, templates

_EMBED = names.name_of(names.EMBED_PATH, "meta")
_HEAD = names.name_of(names.HEAD_PATH, "meta")
_WIDTH = "layers.0.feed_forward.w1.weight"


def read(
  path: str | os.PathLike, model: str | None = None
) -> tuple[config_lib.LlamaConfig, dict[str, Any], Any]:
  """A folder as (LlamaConfig, params, tokenizer or None).

  Raises:
    BadFileError: a file is damaged or missing, or this is not a Llama.
  """
  config, source = open_tensors(path, model)
  tokenizer = read_tokenizer(path, model)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  return config, weights.read_params(config, source), tokenizer


def read_tokenizer(path: str | os.PathLike, model: str | None = None) -> Any:
  """The folder's tokenizer, or None if it holds none.

  Meta's folders carry no chat template. One that is called a chat model's, or
  whose preset is ("chat" or "instruct" in the name), gets that of its family.
  """
  tokenizer = text.find_tokenizer(path)
  if tokenizer is None or tokenizer.chat_template is not None:
    return tokenizer
  called = model or pathlib.Path(path).resolve().name
  if re.search("chat|instruct", called, re.IGNORECASE):
    name, differs = sizes.nearest(read_config(path, model))
    if not differs:
      templates.give(tokenizer, name)
  return tokenizer


def read_config(
  path: str | os.PathLike, model: str | None = None
) -> config_lib.LlamaConfig:
  """The configuration; of the weights no more is read than tells if tied."""
  return open_tensors(path, model)[0]


def open_tensors(
  path: str | os.PathLike, model: str | None = None
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The configuration and the tensors in Meta's names and layout.

  Args:
    path: the folder.
    model: the preset of model.sizes that it is, which then says what
      params.json does not.

  Raises:
    BadFileError: a file is damaged or missing, or this is not a Llama, or
      nobody says which.
    ConfigError: it is another model than the preset.
  """
  folder = _folder(path)
  said = meta_params.read(folder)
  archives = [torch_zip.Archive(folder / name) for name in _parts(folder)]
  source = meta_parallel.join(archives, said, os.fspath(folder))
  for name in (_EMBED, _WIDTH):
    if name not in source.tensors:
      raise errors.BadFileError(
        f"{folder} lacks the tensor {name}, which every Llama has."
      )
  vocab_size, width = (source.tensors[n].shape[0] for n in (_EMBED, _WIDTH))
  config = meta_config.resolve(said, vocab_size, width, model)
  if model is None and said.tied_embeddings is None:
    tied = _HEAD not in source.tensors
    tied = tied or (
      config.tied_embeddings and weights.same(source, _HEAD, _EMBED)
    )
    config = dataclasses.replace(config, tied_embeddings=tied)
  weights.check(config, source)
  return config, source


def write(
  path: str | os.PathLike,
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  tokenizer: Any,
  **settings: Any,
) -> None:
  """Writes params in memory as a folder that Meta's code loads.

  Args:
    path: the folder; it must be absent or empty.
    config: the model's configuration.
    params: our tree, whose dtypes stay.
    tokenizer: see write_into.
    **settings: see write_into.

  Raises:
    UserError: the destination is taken or cannot be written, or params.json
      cannot say this configuration.
    BadFileError: params are not those of config.
  """
  source = weights.from_params(config, params, "meta")
  with building.building(path) as site:
    write_into(site, config, source, tokenizer, **settings)


def write_into(
  site: building.Building,
  config: config_lib.LlamaConfig,
  source: weights.Source,
  tokenizer: Any,
  *,
  model_parallel: int = 1,
  block_bytes: int = weights.BLOCK_BYTES,
) -> None:
  """Fills a site with a folder that Meta's code loads.

  Args:
    site: where to; what an earlier process finished there is not done again.
    config: the model's configuration.
    source: the weights in any scheme; they keep its dtypes.
    tokenizer: saved beside the weights; or None.
    model_parallel: files among which the model is shared out, as many as the
      devices that Meta's code will run it on.
    block_bytes: of weights in memory at once, about.

  Raises:
    ConfigError: params.json cannot say this configuration, as that of a reward
      model, or the model cannot be shared out so.
  """
  source = _with_head(config, weights.as_scheme(config, source, "meta"))
  fields, ours = meta_params.write_fields(config)
  meta_parallel.check_width(config, model_parallel)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  folder = site.content
  folder.mkdir(exist_ok=True)
  V, R = config.vocab_size, model_parallel
  cut = meta_parallel.cut_tensors(source, V, R)
  with contextlib.ExitStack() as stack:
    drafts = [
      stack.enter_context(torch_draft.Draft(folder / _part(rank), cut))
      for rank in range(R)
    ]

    def put(name: str, start: int, rows: np.ndarray) -> None:
      length = source.tensors[name].shape[0]
      for rank, part in meta_parallel.cut_rows(name, start, rows, length, V, R):
        drafts[rank].append(name, part)

    site.fill(
      source,
      source.tensors,
      block_bytes,
      put,
      lambda name: _num_bytes(config, source, name),
    )
    for draft in drafts:
      draft.finish()
  files.write_json(folder / meta_params.PARAMS, fields)
  files.write_json(folder / meta_params.OURS, ours)
  if tokenizer is not None:
    tokenizer.save(folder)


def _with_head(
  config: config_lib.LlamaConfig, source: weights.Source
) -> weights.Source:
  """The tensors that the files will hold: of a tied model, the head too."""
  tensors = {
    place.name: source.tensors[place.name]
    for place in names.places(config, "meta")
  }
  if config.tied_embeddings:
    tensors[_HEAD] = tensors[_EMBED]

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    tied = config.tied_embeddings and name == _HEAD
    return source.rows(_EMBED if tied else name, start, stop)

  return weights.Source(source.file, "meta", tensors, rows)


def _num_bytes(
  config: config_lib.LlamaConfig, source: weights.Source, name: str
) -> int:
  """Of the model that a tensor is; a tied head is none of its own."""
  if name == _HEAD and config.tied_embeddings:
    return 0
  return source.tensors[name].num_bytes


def _part(rank: int) -> str:
  return f"consolidated.{rank:02d}.pth"


def _parts(folder: pathlib.Path) -> list[str]:
  """The names of the folder's files of weights, in their order."""
  found = sorted(path.name for path in folder.glob("consolidated*.pth"))
  if not found:
    raise errors.BadFileError(
      f"{folder} holds no {_part(0)}; meta: takes a folder as Meta publishes"
      f" them, with {meta_params.PARAMS}."
    )
  if found != [_part(rank) for rank in range(len(found))]:
    raise errors.BadFileError(
      f"{folder} holds {', '.join(found[:8])}; the files must be {_part(0)},"
      f" {_part(1)} and so on, without a gap."
    )
  for name in found:
    files.inside(folder, name)
  return found


def _folder(path: str | os.PathLike) -> pathlib.Path:
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise errors.BadFileError(
      f"{folder} is not a folder; meta: takes one that holds"
      f" {meta_params.PARAMS} and {_part(0)}."
    )
  for name in (meta_params.PARAMS, meta_params.OURS):
    if (folder / name).is_symlink():
      files.inside(folder, name)
  return folder
