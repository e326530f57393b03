"""Templates from strangers (RELIABILITY.md, S4): they reach nothing but their
own values, and they end, whatever they try."""

import json
import os
import pathlib
import random
import threading

import pytest

from llama_jax import errors
from llama_jax.text import jinja, jinja_child, templates

_TRACE = "a9f3-what-an-injection-would-print"
# Every way to what lies behind a value that Jinja's past holes and their kin
# have taught; each would print _TRACE or another object's name if it got there.
_PLACES = [
  "''.__class__",
  "''['__class__']",
  "''|attr('__class__')",
  "''|attr('__cla' ~ 'ss__')",
  "''|attr('\\x5f\\x5fclass\\x5f\\x5f')",
  "().__class__.__bases__[0].__subclasses__()",
  "().__class__.__mro__[1].__subclasses__()[40]",
  "[].__class__.__base__",
  "{}.__class__.__init__.__globals__",
  "messages.__class__",
  "messages.__init__.__globals__",
  "messages[0].__reduce_ex__(2)",
  "self.__init__.__globals__",
  "self._TemplateReference__context.environment",
  "self._TemplateReference__context",
  "raise_exception.__globals__",
  "raise_exception.__code__",
  "raise_exception.__globals__['os'].popen('id').read()",
  "strftime_now.__globals__.os.environ",
  "strftime_now.__closure__",
  "strftime_now.__defaults__",
  "range.__init__",
  "lipsum.__globals__['os'].popen('id').read()",
  "lipsum.__globals__.__builtins__",
  "cycler.__init__.__globals__.os",
  "joiner.__init__.__globals__.os",
  "namespace.__init__.__globals__.os",
  "dict.__base__.__subclasses__()",
  "dict.mro()",
  "(1).__class__.__bases__",
  "1.0.__class__",
  "none.__class__",
  "undefined_name.__class__",
  "undefined_name.x.__init__.__globals__",
  "''.join.__self__.__class__",
  "''.format.__self__.__class__",
  "'{0.__class__}'.format('')",
  "'{0.__class__.__mro__}'.format('')",
  "'{m.__class__.__init__.__globals__}'.format(m=messages)",
  "'{0[0].__class__}'.format(messages)",
  "'%s'.__mod__.__self__",
  "('{0.__cl' ~ 'ass__}').format('')",
  "'{0.__class__}'.format_map({'0': ''})",
  "'{x.__class__}'.format_map({'x': ''})",
  "(''|attr('format'))('{0.__class__}')",
  "['{0.__class__}']|map('format', '')|first",
  "['']|map(attribute='__class__')|first",
  "['']|map('attr', '__class__')|first",
  "['']|sum(attribute='__class__', start='')",
  "['']|groupby('__class__')",
  "['']|selectattr('__class__')|list",
  "messages|map(attribute='__init__')|list",
  "messages.append(1)",
  "messages.clear()",
  "messages[0].update({'role': 'x'})",
  "messages[0].pop('role')",
  "messages[0].setdefault('x', 1)",
  "open('/etc/passwd').read()",
  "__import__('os').system('id')",
  "eval('1+1')",
  "config.items()",
  "request.application.__globals__",
  "get_flashed_messages.__globals__",
  "caller.__globals__",
  "loop.__init__.__globals__",
  "varargs.__class__.__mro__",
]
_STATEMENTS = [
  "{% include '/etc/passwd' %}",
  "{% import 'os' as os %}{{ os.environ }}",
  "{% from 'os' import environ %}{{ environ }}",
  "{% extends '/etc/passwd' %}",
  "{% macro m() %}x{% endmacro %}{{ m.__globals__ }}",
  "{% macro m() %}x{% endmacro %}{{ m._func.__globals__ }}",
  "{% macro m() %}x{% endmacro %}{{ m._environment }}",
  "{% for i in [1] %}{{ loop._iterator }}{{ loop.__class__ }}{% endfor %}",
  "{% set c = cycler('a') %}{{ c.__init__.__globals__ }}",
  "{% set messages.x = 1 %}",
  "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
  "{% do messages.append(1) %}",
  "{% debug %}",
]
_ENDLESS = [
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
  "{% endfor %}",
  "{% for i in range(9999) %}{% for j in range(9999) %}"
  "{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
  "{% for i in [0] recursive %}{{ loop([0, 0]) }}{% endfor %}",
  "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
  "{% endmacro %}{{ f(99) }}",
  "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
  "{{ range(99999)|map('string')|sort|join }}" * 99,
  "{{ 9 ** (9 ** 9) }}",
  "{% set n = 9 ** 9999 %}{% for i in range(9999) %}{{ n * n }}{% endfor %}",
  "{{ 'a' * 10 ** 9 }}",
  "{{ [0] * 10 ** 9 }}",
  "{{ '%999999999d' % 1 }}",
  "{{ '%*d'|format(999999999, 1) }}",
  "{{ '{:>999999999}'.format(1) }}",
  "{{ '{:{}}'.format(1, 999999999) }}",
  "{{ 'a'.ljust(10 ** 9) }}",
  "{{ '\\t'.expandtabs(10 ** 9) }}",
  "{{ 'a'|center(10 ** 9) }}",
  "{{ 'a\na'|indent(10 ** 9) }}",
  "{{ 'a'.zfill(10 ** 9) }}",
  "{{ [1]|batch(10 ** 9, 0)|list }}",
  "{{ [1]|slice(10 ** 9)|list }}",
  "{{ {'a': 1}|tojson(indent=10 ** 9) }}",
  "{{ lipsum(n=10 ** 6) }}",
  "{{ range(10 ** 9)|list }}",
  "{% for i in range(10**9) %}{% endfor %}",
  "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
  "{% set n = namespace(s='ab') %}{% for i in range(99) %}"
  "{% set n.s = n.s ~ n.s %}{% endfor %}",
  "{% set n = namespace(s='ab') %}{% for i in range(99) %}"
  "{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
  "{% set n = namespace(s=[1]) %}{% for i in range(99) %}"
  "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
  "{% set n = namespace(s=[1]) %}{% for i in range(99) %}"
  "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s|tojson }}",
  "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(99) %}"
  "{% set n.s = [n.s, n.s] %}{% set n.t = [n.t, n.t] %}{% endfor %}"
  "{{ n.s == n.t }}",
  "{% set n = namespace(s=[]) %}{% for i in range(99999) %}"
  "{% set n.s = n.s + [range(99999)|list] %}{% endfor %}",
  "{{" + "(" * 9999 + "1" + ")" * 9999 + "}}",
  "{{" + "-" * 99999 + "1}}",
  "{% if a %}" * 9999,
  "{{ " + "a." * 99999 + "b }}",
]


def _render(source, **variables):
  given = {"messages": [{"role": "user", "content": "x"}], **variables}
  return jinja.render(source, given).text


@pytest.mark.parametrize(
  "source", [*(f"{{{{ {place} }}}}" for place in _PLACES), *_STATEMENTS]
)
def test_injections_reach_nothing(source, monkeypatch):
  monkeypatch.setenv("LLAMA_JAX_TEST_SECRET", _TRACE)
  try:
    text = _render(source)
  except errors.UserError:
    return
  # What it may print: nothing, or that there is no such thing.
  for sign in (_TRACE, "<class", "<function", "<module", "root:", "uid="):
    assert sign not in text
  assert "object at" not in text


@pytest.mark.parametrize("number", range(len(_ENDLESS)))
def test_templates_end(number):
  """Each is stopped by one of the limits, or by an error of its own, never by
  a crash of ours; and the next template renders."""
  with pytest.raises(errors.UserError):
    _render(_ENDLESS[number])
  assert _render("{{ messages[0].content }}") == "x"


def test_the_limits_are_those_that_reliability_names():
  """The kernel holds a template to them: no time is measured here."""
  assert jinja_child.CPU_SECONDS <= 2 and jinja_child.MEGABYTES <= 256
  _render("x")
  (child,) = (
    path for path in pathlib.Path("/proc").glob("[0-9]*") if _is_child(path)
  )
  limits = (child / "limits").read_text().splitlines()
  memory = next(line for line in limits if "address space" in line).split()
  assert int(memory[-2]) == 256 << 20


def _is_child(path) -> bool:
  try:
    words = (path / "stat").read_text().rpartition(")")[2].split()
    command = (path / "cmdline").read_text()
  except OSError:  # gone meanwhile
    return False
  return int(words[1]) == os.getpid() and "jinja_child" in command


def test_a_template_sees_no_environment(monkeypatch):
  """Even one that broke out of the sandbox would find nothing there."""
  monkeypatch.setenv("LLAMA_JAX_TEST_SECRET", _TRACE)
  child = jinja._start()
  try:
    environment = pathlib.Path(f"/proc/{child.pid}/environ").read_bytes()
    assert _TRACE.encode() not in environment
  finally:
    child.kill()
    child.wait()


def test_values_go_in_and_out_as_they_are():
  value = {"é": ["\ue000 \u2028 🦙", 1, 2.5, None, True, {"<": "\x00"}]}
  assert json.loads(_render("{{ v|tojson }}", v=value)) == value
  assert _render("{{ v }}", v="\x00\r\n\ue000") == "\x00\r\n\ue000"
  with pytest.raises(errors.UserError, match="must be JSON"):
    _render("", v=object())
  nest = []
  for _ in range(100_000):
    nest = [nest]
  with pytest.raises(errors.UserError, match="must be JSON"):
    _render("", v=nest)


def test_threads_get_their_own_answers():
  wrong = []

  def ask(name):
    for i in range(50):
      if _render("{{ v }}", v=f"{name} {i}") != f"{name} {i}":
        wrong.append(name)

  threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


@pytest.mark.parametrize(
  "count", [200, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_mutants_render_or_are_refused(count):
  """RELIABILITY.md, S1, for chat templates: letters of real ones changed,
  parts of them left out, doubled or put elsewhere."""
  pick = random.Random(count)
  sources = list(templates.TEMPLATES.values())
  letters = "{}%|-~()[].,:'\"\\ \n01azS_\0é\ue000"
  kept = 0
  for _ in range(count):
    source = pick.choice(sources)
    for _ in range(pick.randrange(1, 4)):
      one, two = sorted(pick.randrange(len(source) + 1) for _ in range(2))
      part = source[one:two]
      source = pick.choice(
        (
          source[:one] + source[two:],
          source[:one] + part + part + source[two:],
          source[:one] + source[two:] + part,
          source[:one] + pick.choice(letters) + source[one + 1 :],
          source[:one] + pick.choice(letters) * 9 + source[one:],
        )
      )
    try:
      kept += bool(_render(source, tools=None, add_generation_prompt=True))
    except errors.UserError:
      continue
  assert 0 < kept < count
