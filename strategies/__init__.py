"""Integrations of `adadelta_dist` with training frameworks.

Import it as `adadelta_dist.strategies`. The core does not import it.
"""

if __name__ != "adadelta_dist.strategies":
    raise ImportError(
        f"this package was imported as {__name__!r}, which would make second copies of its "
        "classes: import adadelta_dist.strategies instead"
    )
