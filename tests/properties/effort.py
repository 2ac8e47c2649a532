"""How hard the property and fuzz tests try: the same examples every time in CI, new and more of them by request.

`MIXWRIGHT_FUZZ=20` tries 20 times as many examples, drawn anew at every start; what fails is printed so that it can be
tried again.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

TIMES = int(os.environ.get("MIXWRIGHT_FUZZ", "0"))
"""0: the fast profile."""


def effort(num_examples: int) -> settings:
    """Settings of a test that tries so many examples in CI."""
    return settings(
        max_examples=num_examples * max(TIMES, 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        # Shrinking explains a failure; without one it costs nothing.
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
