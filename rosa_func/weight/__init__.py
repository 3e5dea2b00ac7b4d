"""What a weight is made of, how a state holds it, and how it is computed with."""

from rosa_func.weight import rules  # noqa: F401  (what composed weights do)
from rosa_func.weight.composed import Composed, all_composed
from rosa_func.weight.layout import Parts, read, write
from rosa_func.weight.parts import Base, Term, Weight

__all__ = ["Base", "Composed", "Parts", "Term", "Weight", "all_composed", "read", "write"]
