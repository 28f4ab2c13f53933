"""The device agent's weights in the form of ``kernels.rank_candidates``."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cda4rec_jax.agents.device.features import (
    DEVICE_SCORE_SCALE,
    FEATURES,
    REQUEST_FEATURES,
    SEMANTIC_FEATURES,
    STRUCTURED_FEATURES,
)
from cda4rec_jax.agents.device.modeling import DeviceAgent
from cda4rec_jax.kernels.rank_candidates import RankerWeights


def ranker_weights(device: DeviceAgent, history_length: int, without: tuple[str, ...] = ()) -> RankerWeights:
    """What the kernel computes the user state and the scores with; later changes of the agent are not seen.

    Args:
        device: a trained agent.
        history_length: events of the longest history that is read; its prefix comes before them.
        without: names of features that are 0 for every candidate; the kernel leaves ``device_score`` out, the caller the others.
    """
    blocks, head = list(device.decoder.blocks), device.head
    present = {name: "cloud_present" for name in SEMANTIC_FEATURES} | {name: "structured_present" for name in STRUCTURED_FEATURES}
    gates = [FEATURES.index(present[name]) if name in present else len(FEATURES) for name in FEATURES]

    def stacked(weight: Callable[[Any], Any]) -> np.ndarray:
        return np.stack([np.asarray(weight(block)[...]) for block in blocks])

    return RankerWeights(
        attention_norm=stacked(lambda block: block.attention_norm.scale),
        qkv=stacked(lambda block: block.attention.qkv),
        out=stacked(lambda block: block.attention.out),
        mlp_norm=stacked(lambda block: block.mlp_norm.scale),
        gate_up=stacked(lambda block: block.mlp.gate_up),
        down=stacked(lambda block: block.mlp.down),
        final_norm=np.asarray(device.decoder.final_norm.scale[...]),
        linear=np.asarray(head.linear[...]),
        moderators=np.asarray(head.by_request[...]),
        moderating=np.asarray([FEATURES.index(name) for name in REQUEST_FEATURES], np.int32),
        hidden=np.asarray(head.hidden[...]),
        bias=np.asarray(head.bias[...]),
        out_units=np.asarray(head.out[...]),
        mean=np.asarray(head.mean[...]),
        deviation=np.asarray(head.deviation[...]),
        gates=np.asarray(gates, np.int32),
        score_scale=np.asarray(0.0 if "device_score" in without else DEVICE_SCORE_SCALE, np.float32),
        num_heads=blocks[0].attention.num_heads,
        num_kv_heads=blocks[0].attention.num_kv_heads,
        window=history_length + 1,
        score_feature=FEATURES.index("device_score"),
    )
