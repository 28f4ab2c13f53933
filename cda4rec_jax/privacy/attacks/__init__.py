"""Attacks that measure what leaves the device."""

from cda4rec_jax.privacy.attacks.history_recovery import exposure_by_level as exposure_by_level
from cda4rec_jax.privacy.attacks.history_recovery import history_recovery as history_recovery
