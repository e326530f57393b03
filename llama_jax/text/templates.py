r"""Chat formats of Meta's models, whose own folders carry no template.

The ids are those of Meta's code, where that code refuses nothing:

  llama2         llama, generation.py: each pair of turns is a text of its own,
                 with BOS, and EOS after the answer and a space. The system
                 message goes into the first user's. Code Llama 7B to 34B alike.
  codellama-70b  codellama, generation.py: "Source:" headers, <step> after each
                 turn. There header and body are encoded apart, so that
                 SentencePiece puts a space before the body; here it is written.
  llama3         llama3, chat_format.py: a header and <|eot_id|> for each turn.
  llama3.1       llama-models, chat_format.py and llama3_1/prompt_format.md:
                 what tools there are, calls after <|python_tag|>, ended by
                 <|eom_id|>, and their results from "ipython".

Departures: white space around a message goes in all of them (llama-models
keeps it); llama-models writes <|python_tag|> before Python only, its published
prompts before every call, and so does this.

Llama 2's tags are plain text, so a message that holds one could forge a turn;
it is refused, as in Meta's code. The other formats are made of special tokens,
which no message can write.
"""

import os

from llama_jax import errors
from llama_jax.text import files
from llama_jax.text import tokenizer as tokenizer_lib

_LLAMA2 = r"""
{%- set offset = 0 -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
  {%- set offset = 1 -%}
  {%- set system = "<<SYS>>\n" ~ messages[0].content ~ "\n<</SYS>>\n\n" -%}
{%- endif -%}
{%- for message in messages -%}
  {%- for tag in ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"] -%}
    {%- if tag in message.content -%}
      {{- raise_exception("a message holds the tag " ~ tag) -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- for message in messages[offset:] -%}
  {%- if message.role != ["user", "assistant"][loop.index0 % 2] -%}
    {{- raise_exception("roles must be an optional system, then user and"
        ~ " assistant in turn") -}}
  {%- endif -%}
  {%- if message.role == "user" -%}
    {%- set said = (system if loop.first else "") ~ message.content -%}
    {{- bos_token ~ "[INST] " ~ said | trim ~ " [/INST]" -}}
  {%- else -%}
    {{- " " ~ message.content | trim ~ " " ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

_CODELLAMA_70B = r"""
{{- bos_token -}}
{%- if messages[0].role != "system" -%}
  {{- " Source: system<step>" -}}
{%- endif -%}
{%- set offset = 1 if messages[0].role == "system" else 0 -%}
{%- for message in messages -%}
  {%- if (loop.index0 or not offset)
         and message.role != ["user", "assistant"][(loop.index0 - offset) % 2]
  -%}
    {{- raise_exception("roles must be an optional system, then user and"
        ~ " assistant in turn") -}}
  {%- endif -%}
  {{- " Source: " ~ message.role -}}
  {%- if message.destination is defined -%}
    {{- "\nDestination: " ~ message.destination | trim -}}
  {%- endif -%}
  {%- if message.content -%}
    {{- " \n\n " ~ message.content | trim -}}
  {%- endif -%}
  {{- "<step>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- " Source: assistant\nDestination: user \n\n " -}}
{%- endif -%}
"""

_LLAMA3 = r"""
{%- macro header(role) -%}
  {{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" -}}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
  {{- header(message.role) ~ message.content | trim ~ "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- header("assistant") -}}
{%- endif -%}
"""

# The wording around the tools is what the model was trained on. Variables:
# `tools`, a list of JSON schemas; `builtin_tools`, a list of "brave_search",
# "wolfram_alpha" and "code_interpreter"; `date_string`, else today's.
_LLAMA3_1 = r"""
{%- macro header(role) -%}
  {{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" -}}
{%- endmacro -%}
{%- macro written(function) -%}
  {%- set given = function.arguments -%}
  {%- if function.name == "code_interpreter" -%}
    {{- given if given is string else given.code -}}
  {%- elif function.name in ["brave_search", "wolfram_alpha"] -%}
    {%- if given is string -%}
      {{- raise_exception("arguments of " ~ function.name ~ " must be an"
          ~ " object with a query") -}}
    {%- endif -%}
    {{- function.name ~ '.call(query="' ~ given.query ~ '")' -}}
  {%- else -%}
    {{- '{"type": "function", "name": ' ~ function.name | tojson(true) -}}
    {{- ', "parameters": ' -}}
    {{- given if given is string else given | tojson(true) -}}
    {{- "}" -}}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set has_system = messages[0].role == "system" -%}
{%- if tools or builtin_tools is defined -%}
  {{- header("system") ~ "Environment: ipython\n" -}}
  {%- set named = builtin_tools | default([])
        | reject("equalto", "code_interpreter") | join(", ") -%}
  {{- "Tools: " ~ named if named -}}
  {{- "\nCutting Knowledge Date: December 2023\nToday Date: " -}}
  {{- (date_string or strftime_now("%d %B %Y")) ~ "\n\n" -}}
  {%- if has_system -%}
    {{- messages[0].content | trim ~ "\n" -}}
  {%- endif -%}
  {{- "<|eot_id|>" -}}
  {%- if tools -%}
    {{- header("user") -}}
    {{- "Answer the user's question by making use of the following functions"
        ~ " if needed.\nIf none of the function can be used, please say so.\n"
        ~ "Here is a list of functions in JSON format:\n" -}}
    {%- for tool in tools -%}
      {{- tool | tojson(indent=4) ~ "\n" -}}
    {%- endfor -%}
    {{- "\nReturn function calls in JSON format.<|eot_id|>" -}}
  {%- endif -%}
{%- elif has_system -%}
  {{- header("system") ~ messages[0].content | trim ~ "<|eot_id|>" -}}
{%- endif -%}
{%- for message in messages[1 if has_system else 0:] -%}
  {{- header("ipython" if message.role == "tool" else message.role) -}}
  {%- if message.tool_calls -%}
    {{- (message.content or "") | trim ~ "<|python_tag|>" -}}
    {%- for one in message.tool_calls -%}
      {{- written(one.function or one) -}}
    {%- endfor -%}
    {{- "<|eom_id|>" -}}
  {%- else -%}
    {{- message.content | trim ~ "<|eot_id|>" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- header("assistant") -}}
{%- endif -%}
"""

TEMPLATES = {
  "llama2": _LLAMA2.strip(),
  "codellama-70b": _CODELLAMA_70B.strip(),
  "llama3": _LLAMA3.strip(),
  "llama3.1": _LLAMA3_1.strip(),
}

# The start of a model's name -> its format; the longest that fits counts.
_MODELS = {
  "llama2": "llama2",
  "codellama": "llama2",
  "codellama-70b": "codellama-70b",
  "llama3": "llama3",
  "llama3.1": "llama3.1",
  "llama3.2": "llama3.1",
  "llama3.3": "llama3.1",
}
# Format -> the token that ends a turn.
_ENDS = {
  "llama2": "</s>",
  "codellama-70b": "<step>",
  "llama3": "<|eot_id|>",
  "llama3.1": "<|eot_id|>",
}


def for_model(name: str) -> str | None:
  """The format, a key of TEMPLATES, of a preset or a family of presets.

  None for a model without one (Llama 1). A base model has that of the chat
  model which was made of it.
  """
  fitting = [start for start in _MODELS if name.startswith(start)]
  return _MODELS[max(fitting, key=len)] if fitting else None


def choose(tokenizer: tokenizer_lib.Tokenizer, given: str, knob: str) -> None:
  """Sets a tokenizer's chat template to the one that a knob gives.

  given: a key of TEMPLATES, or a file of Jinja.

  Raises:
    UserError: it is neither, or ends its turns with a token that the tokenizer
      does not have.
  """
  if given in TEMPLATES:
    tokenizer.chat_template = None
    give(tokenizer, given)
    return
  if not os.path.isfile(given):
    raise errors.UserError(
      f"{knob}={given} is no file; give one of Jinja, or one of"
      f" {', '.join(TEMPLATES)}."
    )
  with files.opened(given) as file:
    content = file.read()
  try:
    tokenizer.chat_template = content.decode()
  except UnicodeDecodeError as error:
    raise errors.BadFileError(
      f"{knob}={given} is not UTF-8: {error}."
    ) from error


def give(tokenizer: tokenizer_lib.Tokenizer, name: str) -> None:
  """Sets the chat template and the stop tokens of a tokenizer that came
  without a template to those of a model of Meta's.

  name: as in for_model; nothing changes where that is None.

  Raises:
    UserError: the tokenizer is of another family.
  """
  format = for_model(name)
  if format is None or tokenizer.chat_template is not None:
    return
  end = tokenizer.special_tokens.get(_ENDS[format])
  if end is None:
    raise errors.UserError(
      f"{name} ends its turns with {_ENDS[format]}, which is no special token"
      " of this tokenizer; use the model's own tokenizer.model."
    )
  tokenizer.chat_template = TEMPLATES[format]
  if end not in tokenizer.stop_ids:
    tokenizer.stop_ids = (*tokenizer.stop_ids, end)
