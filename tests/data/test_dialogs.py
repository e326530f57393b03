"""Every known form of a conversation or a preference says the same."""

import pytest

from llama_jax.data import dialogs

TURN = [
  {"role": "user", "content": "2 + 2?"},
  {"role": "assistant", "content": "4"},
]
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
  "row",
  [
    {"messages": TURN},
    {
      "conversations": [
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
      ]
    },
    {"instruction": "2 + 2?", "input": "", "output": "4"},
    {"prompt": "2 + 2?", "completion": "4", "source": "x"},
    {"question": "2 + 2?", "answer": "4"},
    # As a table has it, where another row is of the other form.
    {"messages": None, "instruction": "2 + 2?", "input": None, "output": "4"},
    {
      "messages": [
        {
          "role": "user",
          "content": [{"type": "text", "text": "2 + "}, {"text": "2?"}],
        },
        {"role": "assistant", "content": "4"},
      ]
    },
  ],
  ids=lambda row: next(iter(row)),
)
def test_forms_of_a_conversation(row):
  assert dialogs.conversation(row).messages == TURN
  assert dialogs.conversation(row | {"system": "Be short."}).messages == [
    SYSTEM,
    *TURN,
  ]


def test_an_input_follows_its_instruction():
  row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
  assert dialogs.conversation(row).messages[0]["content"] == "Add.\n\n2 and 2"


def test_tools_and_calls_in_sharegpt_form():
  row = {
    "conversations": [
      {"from": "human", "value": "Rain?"},
      {
        "from": "function_call",
        "value": '{"name": "weather", "arguments": {"at": "here"}}',
      },
      {"from": "observation", "value": "wet"},
      {"from": "gpt", "value": "Yes."},
    ],
    "tools": '[{"name": "weather"}]',
  }
  found = dialogs.conversation(row)
  assert found.variables == {"tools": [{"name": "weather"}]}
  assert [m["role"] for m in found.messages] == [
    "user",
    "assistant",
    "tool",
    "assistant",
  ]
  call = found.messages[1]["tool_calls"][0]["function"]
  assert call == {"name": "weather", "arguments": {"at": "here"}}


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"prompt": TURN[:1], "chosen": TURN[1:], "rejected": [
      {"role": "assistant", "content": "5"}]},
    {"chosen": TURN, "rejected": [
      TURN[0], {"role": "assistant", "content": "5"}]},
    {
      "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
      "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
    },
    {
      "prompt": "\n\nHuman: 2 + 2?\n\nAssistant:",
      "chosen": "4",
      "rejected": "5",
    },
    {
      "conversations": [{"from": "human", "value": "2 + 2?"}],
      "chosen": {"from": "gpt", "value": "4"},
      "rejected": {"from": "gpt", "value": "5"},
    },
  ],
)  # fmt: skip
def test_forms_of_a_preference(row):
  found = dialogs.preference(row)
  assert found.prompt == TURN[:1]
  assert found.answers == ("4", "5")
  assert found.rating == -1 and found.safe == (-1, -1)


def test_three_answers_ratings_and_safety():
  row = {
    "prompt": "2 + 2?",
    "edited": "It is 4.",
    "chosen": "4",
    "rejected": "5",
    "rating": "Negligibly better / unsure",
    "chosen_safe": True,
    "rejected_safe": False,
  }
  found = dialogs.preference(row)
  assert found.answers == ("It is 4.", "4", "5")
  assert dialogs.RATINGS[found.rating] == "unsure"
  assert found.safe == (-1, 1, 0)


def test_a_dialog_of_many_turns_keeps_them():
  row = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
  }
  found = dialogs.preference(row)
  assert [m["content"] for m in found.prompt] == ["a", "b", "c"]
  assert found.answers == ("d", "e")


PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"instruction": "x", "output": " "}, "an answer is empty"),
    ({"messages": TURN[:1]}, "no message is the assistant's"),
    ({"messages": []}, "no list of messages"),
    ({"messages": [{"role": "user"}]}, "lacks its role or its content"),
    ({"question": "x", "answer": 4}, '"answer" is no text'),
    ({"a": 1, "b": 2}, "it has the keys a, b"),
  ],
)
def test_conversations_that_cannot_be_used(row, reason):
  with pytest.raises(dialogs.Unusable, match=reason):
    dialogs.conversation(row)


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"rejected": "4"}, "two answers are alike"),
    ({"rejected": "4 "}, "two answers are alike"),
    ({"rejected": ""}, "an answer is empty"),
    ({"rating": "much better"}, "rating 'much better' is not in the table"),
    ({"prompt": TURN}, "no message before the answer is the user's"),
    ({"chosen": TURN[:1]}, "does not end with the assistant"),
    ({"chosen": [SYSTEM, *TURN]}, "answers another prompt"),
    ({"chosen_safe": 1}, '"chosen_safe" must be true or false'),
  ],
)
def test_preferences_that_cannot_be_used(change, reason):
  with pytest.raises(dialogs.Unusable, match=reason):
    dialogs.preference(PAIR | change)


def test_what_was_not_edited_is_no_third_answer():
  for edited in (None, PAIR["chosen"], PAIR["chosen"] + " "):
    found = dialogs.preference(PAIR | {"edited": edited})
    assert found == dialogs.preference(PAIR)


def test_a_part_that_is_no_text_cannot_be_used():
  parts = [{"type": "text", "text": "see"}, {"type": "image_url"}]
  row = {"messages": [{"role": "user", "content": parts}, TURN[1]]}
  with pytest.raises(dialogs.Unusable, match="a part that is no text"):
    dialogs.conversation(row)


def test_a_row_without_answers_is_no_preference():
  with pytest.raises(dialogs.Unusable, match="not a preference"):
    dialogs.preference({"messages": TURN})
