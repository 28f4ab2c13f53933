"""Attacks that measure what leaves the device.

- ``history_recovery``: the items of the history. Its result is the exposure that planners weigh.
- ``attribute_inference``: personal attributes. ``ridge``: what both are made of.
"""

from cda4rec_jax.privacy.attacks.attribute_inference import AttributeInference as AttributeInference
from cda4rec_jax.privacy.attacks.history_recovery import exposure_by_level as exposure_by_level
from cda4rec_jax.privacy.attacks.history_recovery import history_recovery as history_recovery
