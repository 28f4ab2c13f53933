"""Recommending from a trained run, and telling how the slate came to be.

- ``recommender``: one user's request from planning to the slate.
- ``planning``: the planner's decision for one request.
- ``waterfall``: when each part ran, expected and actual.
- ``recommendation``: the result, as an object and as JSON. ``report``: the same for a person.
"""

from cda4rec_jax.runtime.recommend.recommendation import Recommendation as Recommendation
from cda4rec_jax.runtime.recommend.recommender import Recommender as Recommender
