"""``clead harden``: from photographs, and perhaps a pre-trained network, to a hardened, measured model in a given time."""

from clead.hardening.command import Hardened, harden
from clead.hardening.plan import HardenOptions, Plan, make_plan

__all__ = ["HardenOptions", "Hardened", "Plan", "harden", "make_plan"]
