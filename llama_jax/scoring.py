"""What a reward model thinks of conversations, row by row of a file.

A row is a conversation (data/dialogs.py), or one of `generate --prompts`: a
`prompt` or `messages`, and `completions` that go on with it. The row out keeps
its fields and adds `reward`, or to each completion its own: a logit, of which
the sigmoid is the chance of being good as the model was trained to see it.

B rows, T tokens.
"""

import collections
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import atomic
from llama_jax.data import dialogs, examples, records

# Lengths are rounded up to these, so that few programs are compiled.
_BUCKET = 64
_TOKENS = 4096


def score(llama, source: pathlib.Path, out: pathlib.Path) -> str:
  """Writes the rows of a file with their rewards; returns a line for people.

  Args:
    llama: a reward model with a tokenizer that has a chat template.
    source: JSONL, .gz or .zst.
    out: where to; whole or not at all.

  Raises:
    BadFileError: a row is none, or longer than the model's context.
  """
  kind = examples.Conversations(
    llama.need_tokenizer(), llama.config.context_length, True
  )
  rows, texts, left = [], [], []
  for number, row in enumerate(records.Records(source, field=None), 1):
    where = f"--score={source}, row {number}"
    if isinstance(row, records.Bad):
      raise errors.BadFileError(f"{where}: {row.problem}.")
    try:
      for at, one in _talks(row):
        if isinstance(one, dialogs.Unusable):
          row["completions"][at]["reward"] = None
          left.append(f"{where}: {one}")
        else:
          texts.append((row, at, kind.answered(one)[0]))
    except (dialogs.Unusable, errors.UserError) as error:
      raise errors.BadFileError(f"{where}: {str(error).rstrip('.')}.") from (
        error
      )
    rows.append(row)
  if not texts:
    why = left[0] if left else "no row has an answer"
    raise errors.BadFileError(f"--score={source} has nothing to score ({why}).")
  rewards = _rewards(llama, [ids for _, _, ids in texts])
  for (row, at, _), reward in zip(texts, rewards, strict=True):
    target = row if at is None else row["completions"][at]
    target["reward"] = float(reward)
  atomic.write_text(out, b"".join(map(atomic.json_line, rows)).decode())
  told = f"; {len(left)} without a reward, the first {left[0]}" if left else ""
  return (
    f"{len(texts):,} answers scored, {np.mean(rewards):+.3f} in the mean{told};"
    f" written to {out}"
  )


def _talks(
  row,
) -> Iterator[tuple[int | None, dialogs.Conversation | dialogs.Unusable]]:
  """Conversations of a row, and of which completion each is, if of one.

  A model may say nothing: such a completion comes as what is wrong with it.
  """
  completions = row.get("completions")
  if completions is None:
    yield None, dialogs.conversation(row)
    return
  asked = row.get("messages") or [
    {"role": "user", "content": row.get("prompt")}
  ]
  if not isinstance(completions, list):
    raise dialogs.Unusable('"completions" is no list')
  for at, one in enumerate(completions):
    text = one.get("text") if isinstance(one, dict) else None
    if not isinstance(text, str):
      raise dialogs.Unusable(f"completions[{at}] has no text")
    answer = {"role": "assistant", "content": text}
    try:
      yield at, dialogs.conversation({"messages": [*asked, answer]})
    except dialogs.Unusable as error:
      yield at, error


def _rewards(llama, texts: Sequence[Sequence[int]]) -> np.ndarray:
  """The reward of each text's last token, float32, in order."""
  decoder = llama.decoder

  @jax.jit
  def compute(params, ids_BT, positions_BT, segments_BT, last_B):
    rewards_BT = decoder.apply(
      {"params": params}, ids_BT, positions_BT, segments_BT, method="rewards"
    )
    return jnp.take_along_axis(rewards_BT, last_B[:, None], axis=1)[:, 0]

  by_length: dict[int, list[int]] = collections.defaultdict(list)
  for index, ids in enumerate(texts):
    by_length[-(-len(ids) // _BUCKET) * _BUCKET].append(index)
  found = np.zeros(len(texts), np.float32)
  for length, all_of in by_length.items():
    size = max(1, _TOKENS // length)
    for start in range(0, len(all_of), size):
      group = all_of[start : start + size]
      ids_BT = np.zeros((size, length), np.int32)
      segments_BT = np.zeros_like(ids_BT)
      last_B = np.zeros(size, np.int32)
      for row, index in enumerate(group):
        count = len(texts[index])
        ids_BT[row, :count] = texts[index]
        segments_BT[row, :count] = 1
        last_B[row] = count - 1
      positions_BT = np.broadcast_to(
        np.arange(length, dtype=np.int32), ids_BT.shape
      )
      rewards = compute(llama.params, ids_BT, positions_BT, segments_BT, last_B)
      found[group] = np.asarray(rewards)[: len(group)]
  return found
