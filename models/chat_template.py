# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates, which are strangers' programs, in bounded time and memory.

Jinja's sandbox keeps a template from reaching Python, but lets it loop for hours and build
strings of gigabytes. So everything that a template does has a price, paid from a budget:

- The compiled template calls `step` in each turn of a loop, and `keep` for each container that
  it builds. Calls, operators, filters and printed values pass through the environment anyway.
- What makes a large value of a small one (repetition, widths, replacement) pays before it runs.
- Lists that hold a list twice, and so on, are small to build and take forever to print or to
  compare. So the size of a value counts what it holds as often as it holds it.
"""

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from types import GeneratorType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# The longest template known has 50,000 characters.
MOST_SOURCE = 100_000
"""Characters of a template; more are refused."""
# The budget, in characters made. An input of 100,000 characters renders in a tenth of it.
_BUDGET, _BUDGET_PER_INPUT = 20_000_000, 100
_STEP, _ELEMENT = 100, 10
_SECONDS = 10.0
# Of a width, a count or a precision that a template may ask for.
_MOST_WIDTH = 100_000
_MOST_BITS = 10_000
# Filters that no chat template needs, and whose price isn't known beforehand.
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*([\d*]*)(?:\.([\d*]*))?")

_CONTAINERS = (dict, list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


def render(source: str, variables: Mapping[str, Any], *, name: str) -> str:
    """Renders a chat template.

    Args:
      source: Jinja source, as transformers understands it.
      variables: what the template may read, by name.
      name: the file and key that the template is from, for error messages.

    Raises:
      ValueError: the template is wrong, refuses its variables, or asks for too much.
    """
    try:
        if not isinstance(source, str):
            raise TypeError(f"it is a {type(source).__name__}, not a text")
        if len(source) > MOST_SOURCE:
            raise ValueError(f"it has {len(source)} characters; at most {MOST_SOURCE} are read")
        environment = _Environment(variables)
        pieces = []
        for piece in environment.from_string(source).generate(**variables):
            environment.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)
    except RecursionError as error:
        raise ValueError(f"{name}: the chat template failed: it nests too deep") from error
    except Exception as error:  # whatever a stranger's program may raise
        reason = str(error) or type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise ValueError(f"{name}: the chat template failed: {reason}") from error


class _Namespace(Namespace):
    """Prints no content, which may hold the namespace itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Metered(NodeTransformer):
    """Makes the compiled template call the environment where Jinja alone would not."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step"), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("step"), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("keep", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("keep", node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant else _call("keep", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if constant or node.ctx != "load" else _call("keep", node)


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox for one rendering, with its budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, variables: Mapping[str, Any]):
        # Block trimming and undefined variables as in transformers, for which templates are
        # written.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._printed,
        )
        # Sizes of containers by their id; the containers are kept, so that ids stay theirs.
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._most = self._left = sys.maxsize
        self._deadline = time.monotonic() + _SECONDS
        self._most = self._left = _BUDGET + _BUDGET_PER_INPUT * self._size(dict(variables))
        self.filters["tojson"] = self._to_json
        self.filters = {
            key: self._metered(key, function)
            for key, function in self.filters.items()
            if key not in _LEFT_OUT
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def spend(self, amount: int) -> None:
        """Pays for work or memory."""
        self._left -= amount
        if self._left < 0:
            raise jinja2.TemplateError("it takes too many steps, or makes too much text")
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateError(f"it takes longer than {_SECONDS:g} seconds")

    def step(self) -> bool:
        """Pays for a turn of a loop, by being called."""
        return True

    def keep(self, value: Any) -> Any:
        """Pays for a new value, by being called."""
        return value

    def joined(self, *values: Any) -> str:
        """The `~` of Jinja."""
        for value in values:
            self.spend(self._size(value))
        return "".join(map(str, values))

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a macro or block wrote."""
        pieces = list(pieces)
        self.spend(sum(map(len, pieces)))
        return "".join(pieces)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method for a template."""
        self.spend(_STEP)
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str | bytes | int):
            args = self._pay_method(owner, name, args, kwargs)
        return self._paid(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right` for a template."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | bytes | list | tuple):
                    self.spend(max(times, 0) * (_ELEMENT + self._size(value)))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str | bytes):
            self._pay_percent(left, right)
        return self._paid(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns a `str.format` that pays; Jinja calls it for every attribute."""
        if super().wrap_str_format(value) is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            return _Formatter(self).vformat(str(value.__self__), args, kwargs)

        return formatted

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Metered().visit(tree)
        tree.set_environment(self)
        return tree

    def _size(self, value: Any) -> int:
        """Returns about how many characters a value prints as."""
        if isinstance(value, str | bytes):
            return len(value) + 2
        if isinstance(value, int):
            return 2 + value.bit_length() // 3
        if not isinstance(value, _CONTAINERS):
            return 40
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        size = 2
        for item in value.items() if isinstance(value, dict) else value:
            size += _ELEMENT
            size += sum(map(self._size, item)) if isinstance(value, dict) else self._size(item)
            if size > self._most:
                raise jinja2.TemplateError("it makes too large a value")
        self._sizes[id(value)] = (value, size)
        return size

    def _paid(self, value: Any) -> Any:
        """Pays for a value that was made, and returns it."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, dict | list | tuple | set | frozenset):
            self.spend(_ELEMENT * len(value))
            self._size(value)
        return value

    def _printed(self, value: Any) -> Any:
        self.spend(self._size(value))
        return value

    def _metered(self, name: str, function: Callable) -> Callable:
        """Returns a filter that pays."""

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            # Some filters take the context or the environment first.
            skip = 1 if hasattr(function, "jinja_pass_arg") else 0
            first, rest = args[skip], args[skip + 1 :]
            self.spend(_STEP)
            first, rest = self._pay_filter(name, first, rest, kwargs)
            result = function(*args[:skip], first, *rest, **kwargs)
            if isinstance(result, GeneratorType):
                return self._counted(result, pays=name == "map")
            return self._paid(result)

        return metered

    def _counted(self, items: Iterator[Any], *, pays: bool) -> Iterator[Any]:
        for item in items:
            self.spend(_STEP + (self._size(item) if pays else 0))
            yield item

    def _pay_filter(self, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple]:
        extra = [*args, *kwargs.values()]
        if name in ("batch", "center", "indent", "round", "slice", "truncate"):
            widths = [_check_width(width) for width in extra]
            if name == "indent":
                self.spend((str(value).count("\n") + 1) * max(widths, default=4))
        if name in ("batch", "groupby", "list", "slice", "sort", "unique") and hasattr(
            value, "__len__"
        ):
            self.spend(_ELEMENT * len(value))
        elif name == "replace" and len(args) >= 2:
            self._pay_replace(str(value), str(args[0]), str(args[1]))
        elif name == "replace":
            raise jinja2.TemplateError("replace: write both texts without their names")
        elif name == "format":
            self._pay_percent(str(value), kwargs or args)
        elif name == "join":
            value = list(value)
            self.spend(len(value) * sum(map(self._size, extra)))
        elif name == "sum" and not all(isinstance(x, int | float | str) for x in extra):
            raise jinja2.TemplateError("sum: only numbers can be added")
        return value, args

    def _pay_method(self, owner: Any, name: str, args: tuple, kwargs: dict) -> tuple:
        extra = [*args, *kwargs.values()]
        if name in ("center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"):
            widths = [_check_width(width) for width in extra]
            if name == "expandtabs":
                self.spend(len(owner) * max(widths, default=8))
        elif name in ("maketrans", "striptags", "translate"):
            raise jinja2.TemplateError(f"chat templates can't call {name}()")
        elif name == "replace" and len(args) >= 2:
            self._pay_replace(owner, args[0], args[1])
        elif name in ("rsplit", "split", "splitlines"):
            separator = extra[0] if extra and isinstance(extra[0], str | bytes) else None
            many = owner.count(separator) if separator else len(owner) // 2
            self.spend(_ELEMENT * many)
        elif name == "join" and args and not isinstance(owner, int):
            args = ([*args[0]], *args[1:])
            self.spend(len(args[0]) * len(owner))
        return args

    def _pay_replace(self, text: Any, old: Any, new: Any) -> None:
        self.spend(text.count(old) * len(new))

    def _pay_percent(self, form: str | bytes, values: Any) -> None:
        """Pays for `form % values`."""
        text = form if isinstance(form, str) else form.decode("latin-1")
        for width in (x for found in _PERCENT.findall(text) for x in found if x):
            if "*" in width:
                raise jinja2.TemplateError("a width of * can't be used in chat templates")
            self.spend(_check_width(int(width[:20])))
        self.spend(text.count("%") * self._size(values))

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Arguments as in transformers; Jinja's own filter escapes for HTML.
        _check_width(len(indent) if isinstance(indent, str) else indent)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        chunks = []
        for chunk in encoder.iterencode(value):
            self.spend(len(chunk))
            chunks.append(chunk)
        return "".join(chunks)


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """The `str.format` of templates."""

    _env: _Environment

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._env._printed(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        for digits in re.findall(r"\d+", format_spec):
            self._env.spend(_check_width(int(digits[:20])))
        return super().format_field(self._env._printed(value), format_spec)


def _check_width(width: Any) -> int:
    """Returns a number that is not too large, and 0 for anything but a number."""
    if isinstance(width, str):
        return len(width)
    if not isinstance(width, int):
        return 0
    if abs(width) > _MOST_WIDTH:
        raise jinja2.TemplateError(f"a width or count may be at most {_MOST_WIDTH}")
    return abs(width)


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise jinja2.TemplateError(f"a whole number may have at most {_MOST_BITS} bits")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 1000:
        raise jinja2.TemplateError("strftime_now: the format is too long")
    return datetime.datetime.now().strftime(form)
