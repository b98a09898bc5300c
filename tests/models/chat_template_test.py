# SPDX-License-Identifier: Apache-2.0
import time

import pytest

from kvq_jax.models.chat_template import MOST_SOURCE, render

MESSAGES = [{"role": "user", "content": "hello"}]


def rendered(source, **variables):
    return render(source, {"messages": MESSAGES, "tools": None} | variables, name="x.jinja")


def test_templates_know_what_transformers_offers():
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4
    assert (
        rendered("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    # trim_blocks and lstrip_blocks: lines of tags leave nothing behind.
    assert rendered("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    assert rendered("{{ tools is none }}{{ thinking }}", thinking=False) == "TrueFalse"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", '{"b": "<é>", "a": [1, 2]}'),
        ("ensure_ascii=True", '{"b": "<\\u00e9>", "a": [1, 2]}'),
        ("separators=(',', ':')", '{"b":"<é>","a":[1,2]}'),
        ("sort_keys=True", '{"a": [1, 2], "b": "<é>"}'),
        ("indent=1", '{\n "b": "<é>",\n "a": [\n  1,\n  2\n ]\n}'),
        ("False, none, (', ', ': '), true", '{"a": [1, 2], "b": "<é>"}'),
    ],
)
def test_tojson(arguments, text):
    assert rendered(f"{{{{ x | tojson({arguments}) }}}}", x={"b": "<é>", "a": [1, 2]}) == text


def test_generation_blocks_render_their_content():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}"
    )
    assert rendered(source) == "hello!"
    # As in transformers, what is set within the block stays there.
    assert (
        rendered("{%- generation -%}{% set a = 1 %} {{ a }} {%- endgeneration -%} {{ a }}") == " 1"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ [1, 'b'] }}", "a1None[1, 'b']"),
        ("{{ messages[-1:][0].content[1:3] }}", "el"),
        ("{% set ns = namespace(x=[]) %}{% set ns.x = ns.x + [1] %}{{ ns.x * 2 }}", "[1, 1]"),
        ("{{ messages | map(attribute='content') | join('|') }}", "hello"),
        ("{{ '%s-%3d' % ('a', 5) }}{{ '{0:>3}{x}'.format('b', x=1) }}", "a-  5  b1"),
        ("{{ '%s' | format('a') }}{{ 'ab'.replace('a', 'c') }}{{ 'a b'.split()[1] }}", "acbb"),
        ("{{ {'a': 1}.items() | list }}{{ 2 ** 10 }}{{ 7 % 4 }}", "[('a', 1)]10243"),
        ("{% for i in range(6) if i % 2 %}{{ i }}{{ loop.last }}{% endfor %}", "1False3False5True"),
        ("{% for k, v in {'a': [1]} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a[1]"),
        ("{% macro f(n) %}{{ n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(3) }}", "3210"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | upper | trim | length }}{{ missing }}", "2"),
        ("{% filter upper %}a{% endfilter %}{{ 'a\nb' | indent(2) }}", "Aa\n  b"),
    ],
)
def test_metering_changes_no_result(source, text):
    assert rendered(source) == text


def test_long_conversations_render():
    messages = [{"role": "user", "content": "word " * 200} for _ in range(300)]
    source = (
        "{% set ns = namespace(text='', n=[]) %}{% for m in messages %}"
        "{% set ns.n = ns.n + [m] %}{% if messages | length > 1 and m.content.strip() %}"
        "{{ m.role ~ (m.content | trim) }}{% endif %}{% endfor %}{{ ns.n | length }}"
    )
    text = render(source, {"messages": messages}, name="x.jinja")
    assert text == ("user" + ("word " * 200).strip()) * 300 + "300"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('a' * 10000) }}", r"a\.\.\.$"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 10.0 ** 400 }}", "out of range"),
        ("{{ (10 ** 400) | float }}", "too large"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deep"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nests too deep"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "nested blocks"),
        ("{% include 'x' %}", "no loader"),
        ("x" * (MOST_SOURCE + 1), "characters"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__['os'] }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
        ("{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}", "unsafe"),
        ("{{ namespace.__init__.__globals__ }}", "unsafe"),
        ("{{ range.__self__.spend(-10 ** 9) }}", "has no attribute '__self__'"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(ValueError, match=message) as error:
        rendered(source)
    assert str(error.value).startswith("x.jinja: the chat template failed: ")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["environment", "context", "step", "keep", "spend"])
def test_the_environment_is_out_of_reach(name):
    assert rendered(f"{{{{ {name} is defined }}}}") == "False"


DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        # Loops, also those that yield nothing.
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
        # Texts and lists that are repeated or doubled.
        "{{ ('a' * 2000000000) | length }}",
        "{{ ([1] * 1000000000) | length }}",
        DOUBLE % ("'aa'", "{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLE % ("'aa'", "{% set ns.x = ns.x + ns.x %}"),
        DOUBLE % ("'aa'", "{% set ns.x = [ns.x, ns.x] | join %}"),
        DOUBLE % ("'aa'", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
        DOUBLE % ("'aa'", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
        DOUBLE % ("'aa'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        # Small values that print as large ones, or take forever to compare.
        DOUBLE % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
        DOUBLE % ("(1,)", "{% set ns.x = (ns.x, ns.x) %}"),
        DOUBLE % ("[1]", "{% set ns.x = {1: ns.x, 2: ns.x} %}"),
        DOUBLE % ("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
        DOUBLE % ("[1]", "{% set ns.x = [ns.x] + [ns.x] %}"),
        DOUBLE % ("[1]", "{% set ns.x = (ns.x * 2) | batch(2) | list %}"),
        # Numbers.
        DOUBLE % ("3", "{% set ns.x = ns.x * ns.x %}"),
        "{{ 99999 ** 99999 }}",
        "{{ 5 | round(1000000000) }}",
        "{{ (5).to_bytes(10000000000, 'big') }}",
        # Widths, counts and replacements.
        "{{ 'a' | center(3000000000) }}",
        "{{ 'a'.ljust(3000000000) }}",
        "{{ '%3000000000d' % 5 }}",
        "{{ '%.3000000000f' % 5 }}",
        "{{ '%*d' % (2000000000, 5) }}",
        "{{ '{:3000000000d}'.format(5) }}",
        "{{ '{:{}}'.format(5, 2000000000) }}",
        "{{ ('\t' * 1000000).expandtabs(100000) }}",
        "{{ ('a\n' * 100000) | indent(100000) }}",
        "{{ [1] | batch(3000000000, 0) | list }}",
        "{{ [1, 2] | tojson(indent=2000000000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
        "{{ ('a' * 1000000).join('b' * 1000000) }}",
        "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
        "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
        "{% set ns = namespace(x='a' * 1000000) %}{{ ('{0.x}' * 100000).format(ns) }}",
        "{% set ns = namespace(x='a' * 1000000) %}{{ ([ns] * 9999) | map(attribute='x') | join }}",
        "{{ ([[1] * 1000] * 10000) | sum(start=[]) }}",
        "{{ strftime_now('%Y' * 1000000) }}",
        "{{ lipsum(1000000) }}",
    ],
)
def test_time_and_memory_are_bounded(source, monkeypatch):
    # A hundredth of the budget: the tests are to be fast.
    monkeypatch.setattr("kvq_jax.models.chat_template._BUDGET", 200_000)
    with pytest.raises(ValueError, match=r"x\.jinja: the chat template failed"):
        rendered(source)


def test_a_template_has_ten_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    with pytest.raises(ValueError, match="longer than 10 seconds"):
        rendered("{% for i in range(100) %}{% endfor %}")


def test_a_namespace_may_hold_itself():
    source = "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ [ns.x] }}"
    assert rendered(source) == "<namespace>[<namespace>]"
