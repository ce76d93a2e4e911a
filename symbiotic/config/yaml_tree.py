"""Strict YAML: a plain tree in which every key remembers the line it was written on.

Stricter than PyYAML where its leniency hides mistakes: a key given twice is an error, keys are text, aliases are
refused (``extends`` is the way to share settings), and so are tags and whole numbers beyond 64 bits. Numbers are what
everybody but YAML 1.1 expects: ``1e-4`` is one, while ``010`` (8 there) and ``1:30`` (90 there) are texts.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from symbiotic.config.messages import KeyPath, dotted
from symbiotic.errors import ConfigError

MAX_DEPTH = 20
"""Tables and lists inside each other; a configuration has five."""

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with numbers as :func:`parse_yaml` reads them, without aliases and tags."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, f"alias *{event.anchor} is not allowed; repeat the value or use extends")
        if event.tag is not None:
            raise _refusal(event, f"tag {event.tag} is not allowed; write the value without it")
        if self._depth > MAX_DEPTH:
            raise _refusal(event, f"nested more than {MAX_DEPTH} deep; a configuration needs five")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _refusal(event: yaml.NodeEvent, problem: str) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)


class _Dumper(yaml.SafeDumper):
    """The writing side: quotes a text such as ``1e-4`` that the loader would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """A list that stands in two places is written twice, as the loader takes no alias."""
        return True


_NUMBERS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))
    # Beside YAML 1.1's own patterns: a text that either reading takes for a number is quoted.
    _Dumper.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))


def parse_yaml(text: str, *, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document.

    Args:
        text: the document; an empty one is None.
        source: file name for messages.

    Returns:
        The plain tree (dict, list, str, int, float, bool, None, dates as they are) and the line, from 1, of
        every key path.

    Raises:
        ConfigError: the text is no YAML, has a key twice, a key that is no text, an alias or a tag, is nested too
            deeply, or has a number beyond 64 bits.
    """
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = None if node is None else _plain(loader, node, path=(), lines=lines, source=source)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{_marked(source, error)}: not valid YAML: {_reason(error)}") from error
    except (ValueError, OverflowError) as error:  # an impossible date or number
        raise ConfigError(f"{source}: not valid YAML: {error}; quote the value if it is a text") from error
    return tree, lines


def read_yaml(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Parse a YAML file; see :func:`parse_yaml`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't read the configuration ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a configuration: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    return parse_yaml(text, source=str(path))


def dump_yaml(tree: Any, *, flow: bool = False) -> str:
    """A plain tree as YAML text that :func:`parse_yaml` reads back to the same tree.

    Args:
        tree: dicts, lists and plain values.
        flow: one line, lists as ``[a, b]``, without a line break at the end.
    """
    if flow:
        text = yaml.dump(
            tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20, default_flow_style=True
        )
        return text.removesuffix("...\n").strip()
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _plain(loader: _Loader, node: yaml.Node, *, path: KeyPath, lines: dict[KeyPath, int], source: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path=path, lines=lines, source=source)
    if isinstance(node, yaml.SequenceNode):
        values = []
        for index, item in enumerate(node.value):
            lines[(*path, str(index))] = item.start_mark.line + 1
            values.append(_plain(loader, item, path=(*path, str(index)), lines=lines, source=source))
        return values
    value = loader.construct_object(node, deep=True)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        line = node.start_mark.line + 1
        raise ConfigError(f"{source}:{line}: {dotted(path)} is a number beyond 64 bits; write a smaller one")
    return value


def _mapping(
    loader: _Loader, node: yaml.MappingNode, *, path: KeyPath, lines: dict[KeyPath, int], source: str
) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{source}:{line}: a table or list stands where a key should; write a plain name")
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{source}:{line}: merge keys (<<) are not allowed; use extends")
        key = key_node.value  # the text as written: a group may be called 1 or on
        if key in mapping:
            raise ConfigError(
                f"{source}:{line}: {dotted((*path, key))} is given twice, first in line {lines[(*path, key)]}; "
                "remove one of them"
            )
        lines[(*path, key)] = line
        mapping[key] = _plain(loader, value_node, path=(*path, key), lines=lines, source=source)
    return mapping


def _marked(source: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return source if mark is None else f"{source}:{mark.line + 1}"


def _reason(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    reason = " ".join(str(problem).split())
    return reason if "; " in reason else f"{reason}; correct it there"
