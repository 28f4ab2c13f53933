"""What links do to a request beyond their estimate: how often they fail, how much they vary, how many packets they lose."""

from dataclasses import dataclass

from cda4rec_jax.messages import Link

PACKET_BYTES = 1460  # TCP payload of an Ethernet frame of 1500 bytes (IPv4 and TCP headers take 20 each)
MIN_RETRANSMIT_MS = 200.0  # the usual minimum of the retransmission timer (Linux TCP_RTO_MIN; RFC 6298 suggests 1 s)


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """The virtual-clock link model. Tuples are in the order of ``Link``.

    The round trip and both bandwidths that a request meets are its estimates times LogNormal(0, spread), drawn independently.
    Failure probabilities are declared (context distribution v1). Packet loss is of the order that measurements report: .06% of
    packets for LTE (Huang et al., "An in-depth study of LTE", SIGCOMM 2013), a few times that for WiFi and 3G, percents for EDGE.
    """

    seed: int = 1
    spread: float = 0.35
    failure_probability: tuple[float, ...] = (0.01, 0.02, 0.05, 0.10, 1.0)
    loss_probability: tuple[float, ...] = (0.001, 0.001, 0.005, 0.02, 0.0)

    def __post_init__(self):
        for name in ("failure_probability", "loss_probability"):
            values = getattr(self, name)
            if len(values) != len(Link) or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name} is {values}: expected {len(Link)} probabilities, one for each Link")
