"""The order of packages by their dependencies, with cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


class DependencyOrder:
    """The longest chain of dependencies below each name; names on a cycle share one value.

    Args:
        dependencies: Returns what a name depends on, always the same for the same name.

    Example:
        >>> graph = {"app": ["web", "log"], "web": ["log"], "log": []}
        >>> DependencyOrder(graph.__getitem__).longest_chain("app")
        2

    References:
        Tarjan, "Depth-first search and linear graph algorithms", 1972.
    """

    def __init__(self, dependencies: Callable[[str], Sequence[str]]) -> None:
        self._dependencies = dependencies
        self._chains: dict[str, int] = {}

    def longest_chain(self, name: str) -> int:
        """Return the length of the longest chain below a name, each cycle counted as one link."""
        if name not in self._chains:
            self._measure_from(name)
        return self._chains[name]

    def _measure_from(self, start: str) -> None:
        """Walk down from `start`, and measure each cycle when it is left."""
        order: dict[str, int] = {}  # when a name was first visited
        lowest: dict[str, int] = {}  # the earliest open name that it leads back to
        open_names: list[str] = []
        path: list[tuple[str, Iterator[str]]] = []

        def enter(name: str) -> None:
            order[name] = lowest[name] = len(order)
            open_names.append(name)
            path.append((name, iter(self._dependencies(name))))

        enter(start)
        while path:
            name, rest = path[-1]
            for other in rest:
                if other in self._chains:
                    continue
                if other not in order:
                    enter(other)
                    break
                lowest[name] = min(lowest[name], order[other])
            else:
                path.pop()
                if path:
                    parent = path[-1][0]
                    lowest[parent] = min(lowest[parent], lowest[name])
                if lowest[name] == order[name]:
                    start_of_cycle = open_names.index(name)
                    self._measure_cycle(open_names[start_of_cycle:])
                    del open_names[start_of_cycle:]

    def _measure_cycle(self, cycle: Sequence[str]) -> None:
        """Set the chain of names that depend on each other, or of one name."""
        below = [
            self._chains[other]
            for name in cycle
            for other in self._dependencies(name)
            if other in self._chains
        ]
        self._chains |= dict.fromkeys(cycle, 1 + max(below, default=-1))
