"""How long work reports its progress: one alias for each kind of callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping

# (what is worked on, bytes done, bytes in all)
ByteProgress = Callable[[str, int, int], None]
# (what is worked on, done, in all)
StageProgress = Callable[[str, int, int], None]
# (done, in all)
CountProgress = Callable[[int, int], None]
# (step, steps, figures of the step)
StepProgress = Callable[[int, int, Mapping[str, float]], None]
