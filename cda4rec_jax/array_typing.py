"""One legend of axis letters, and the named array types built from them.

Every signature of the package speaks of arrays by these names, and every einsum uses the same letters:

====  ==============================================================
b     users (or requests) of a batch
r     packed rows of a batch
t     tokens of a packed row
l     events of a history, oldest first, padded with 0 at the end
s     prefixes of a packed batch (one for each segment that has one)
d     width of the cloud agent and of the item table
e     width of the device agent, and of an item vector on the wire
z     text features of an item
n, h  attention heads, and the size of one head
i     catalogue items, where row 0 is padding
g     item categories
a     user attributes, one column per (attribute, value)
m     neighbours kept in one row of item-item evidence
f     features (of a candidate, of a context, of a plan)
c     candidates
k     items of a slate
p     plans
====  ==============================================================
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Int8, UInt8

# Batches are built with NumPy and computed with JAX; both are arrays here, and calls check which (tests). A static checker knows no
# type that both share and that has operators, so for it an array is anything.
if TYPE_CHECKING:
    Array = Any
else:
    Array = jax.Array | np.ndarray

# Interactions and batches
Histories = Int[Array, "b l"]
Lengths = Int[Array, "b"]
Targets = Int[Array, "b"]
Attributes = Float[Array, "b a"]
PackedInts = Int[Array, "r t"]

# Items
ItemVectors = Float[Array, "i d"]
ItemText = Float[Array, "i z"]
ItemCategories = Float[Array, "i g"]
WireVectors = Int8[Array, "... e"]
WireText = Int8[Array, "... z"]
NeighbourItems = Int[Array, "... m"]
NeighbourWeights = UInt8[Array, "... m"]

# User states and what ranking sees
SemanticEmbeddings = Float[Array, "b d"]
CandidateItems = Int[Array, "b c"]
CandidateScores = Float[Array, "b c"]
CandidateMask = Bool[Array, "b c"]
CandidateFeatures = Float[Array, "b c f"]
SlateItems = Int[Array, "b k"]

# Planner
ContextFeatures = Float[Array, "b f"]
PlanLogits = Float[Array, "b p"]
PlanValues = Float[Array, "b p"]
PlanMask = Bool[Array, "b p"]
PlanRanks = Int[Array, "b p"]
