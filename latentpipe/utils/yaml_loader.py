"""PyYAML's safe loader with limits: depth, nodes (aliases count as what they stand for), keys that stand twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

DEEPEST = 32  # lists and mappings within each other
MOST_NODES = 20_000


class Loader(yaml.SafeLoader):
    """Plain types alone; YAMLError says what is wrong and where."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, counted before it is made a value."""
        mark = self.peek_event().start_mark
        alias, before = self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        self._nodes += 1
        self._refuse(self._depth > DEEPEST, f"lists and mappings nested more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        if alias:
            self._refuse(id(node) not in self._sizes, "a value that holds itself", mark)
            self._nodes += self._sizes[id(node)]
        self._refuse(self._nodes > MOST_NODES, f"more than {MOST_NODES:,} values, aliases counted as what they stand for", mark)
        self._sizes[id(node)] = self._nodes - before
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping; a key may stand once."""
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                self._refuse(key in seen, f"the key {str(key)[:80]!r} stands twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(wrong: bool, what: str, mark: Any) -> None:
        if wrong:
            raise yaml.MarkedYAMLError(problem=what, problem_mark=mark)
