"""Everything that is fuzzed, by name."""

from tests.fuzzing.adapters import ADAPTERS
from tests.fuzzing.models import MODELS
from tests.fuzzing.pages import PAGES
from tests.fuzzing.weights import WEIGHTS

__all__ = ["TARGETS"]

TARGETS = {target.name: target for target in (*WEIGHTS, *ADAPTERS, *MODELS, *PAGES)}
