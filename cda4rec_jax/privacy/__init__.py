"""The only door out of the device: levels, gate, ledger, and the attacks that measure what leaves."""

from cda4rec_jax.privacy.gate import EgressDenied as EgressDenied
from cda4rec_jax.privacy.gate import Gate as Gate
from cda4rec_jax.privacy.gate import GatedUplink as GatedUplink
from cda4rec_jax.privacy.ledger import Ledger as Ledger
from cda4rec_jax.privacy.levels import UplinkFields as UplinkFields
