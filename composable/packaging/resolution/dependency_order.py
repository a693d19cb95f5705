"""How high a package stands above those that it builds on, cycles included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


class DependencyOrder:
    """How far names of a graph stand above its floor; names on a cycle stand equally high.

    Args:
        below: Returns what a name builds on, the same every time.

    References:
        Tarjan, "Depth-first search and linear graph algorithms", 1972.
    """

    def __init__(self, below: Callable[[str], Sequence[str]]) -> None:
        self._below = below
        self._order_of_needs: dict[str, int] = {}

    def of(self, name: str) -> int:
        """Return the longest chain below a name, each cycle counted as one link."""
        if name not in self._order_of_needs:
            self._measure(name)
        return self._order_of_needs[name]

    def _measure(self, start: str) -> None:
        """Walk down from `start` and measure each cycle when it is left."""
        order: dict[str, int] = {}  # when a name was met
        lowest: dict[str, int] = {}  # the earliest open name that it leads back to
        open_names: list[str] = []
        path: list[tuple[str, Iterator[str]]] = []

        def enter(name: str) -> None:
            order[name] = lowest[name] = len(order)
            open_names.append(name)
            path.append((name, iter(self._below(name))))

        enter(start)
        while path:
            name, rest = path[-1]
            for other in rest:
                if other in self._order_of_needs:
                    continue
                if other not in order:
                    enter(other)
                    break
                lowest[name] = min(lowest[name], order[other])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[name])
                if lowest[name] == order[name]:
                    cycle = [open_names.pop()]
                    while cycle[-1] != name:
                        cycle.append(open_names.pop())
                    floor = [
                        self._order_of_needs.get(o, -1) for each in cycle for o in self._below(each)
                    ]
                    self._order_of_needs |= dict.fromkeys(cycle, 1 + max(floor, default=-1))
