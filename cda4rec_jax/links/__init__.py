"""Links between device and cloud, on a virtual clock.

- ``profiles``: how links fail, vary and lose packets.
- ``virtual_clock``: what one request meets, and how long its bytes take.
"""

from cda4rec_jax.links.profiles import PACKET_BYTES, LinkConfig
from cda4rec_jax.links.virtual_clock import Realisation, as_estimated, downlink_ms, realise, uplink_ms

__all__ = [
    "PACKET_BYTES",
    "LinkConfig",
    "Realisation",
    "as_estimated",
    "downlink_ms",
    "realise",
    "uplink_ms",
]
