"""Strict YAML: a plain tree in which every key remembers the line it was written on.

Stricter than PyYAML where its leniency hides mistakes: a key given twice is an error, keys are text, and
aliases are refused (``extends`` is the way to share settings). More lenient in one place: ``1e-4`` is a number,
as everybody but YAML 1.1 expects.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from symbiotic.config.messages import KeyPath, dotted
from symbiotic.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with ``1e-4`` as a number and without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor} is not allowed; repeat the value or use extends", event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """The writing side: quotes a text such as ``1e-4`` that the loader would read as a number."""


def _replace_float_resolver(owner: type[yaml.resolver.BaseResolver]) -> None:
    tag = "tag:yaml.org,2002:float"
    owner.yaml_implicit_resolvers = {
        first: [(known, pattern) for known, pattern in resolvers if known != tag]
        for first, resolvers in owner.yaml_implicit_resolvers.items()
    }
    owner.add_implicit_resolver(tag, _FLOAT, list("-+0123456789."))


_replace_float_resolver(_Loader)
_replace_float_resolver(_Dumper)


def parse_yaml(text: str, *, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document.

    Args:
        text: the document; an empty one is None.
        source: file name for messages.

    Returns:
        The plain tree (dict, list, str, int, float, bool, None, dates as they are) and the line, from 1, of
        every key path.

    Raises:
        ConfigError: the text is no YAML, has a key twice, a key that is no text, an alias or a foreign tag.
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
    except RecursionError:
        raise ConfigError(f"{source}: not a configuration: nested too deeply") from None
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
        raise ConfigError(f"{path}: not a configuration: byte {error.start} is not UTF-8") from error
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
    return loader.construct_object(node, deep=True)


def _mapping(
    loader: _Loader, node: yaml.MappingNode, *, path: KeyPath, lines: dict[KeyPath, int], source: str
) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{source}:{line}: a key must be a plain name")
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
    return " ".join(str(problem).split())
