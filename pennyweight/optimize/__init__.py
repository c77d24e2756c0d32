"""The search over plans under a budget, with the proof.

Importing anything of it registers every transform, so that any stored plan can be read.
"""

from pennyweight.accelerate import tune  # noqa: F401
from pennyweight.compress import distill, prune, quantize, share  # noqa: F401
from pennyweight.distribute import planner  # noqa: F401
from pennyweight.schedule import queue  # noqa: F401
