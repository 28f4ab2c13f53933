"""Complete configurations by name. A preset is a function; its arguments are what differs between datasets."""

import difflib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cda4rec_jax.agents.cloud import CloudConfig
from cda4rec_jax.agents.device import DeviceConfig
from cda4rec_jax.data import Interactions, read_interactions
from cda4rec_jax.data.packing import PackingConfig
from cda4rec_jax.data.sources import SYNTHETIC, source_name
from cda4rec_jax.errors import UserError
from cda4rec_jax.nn import DecoderConfig, ItemTableConfig
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.training import RunConfig, TrainConfig


def _decoder(width: int, num_layers: int, dropout_rate: float, num_heads: int = 2) -> DecoderConfig:
    return DecoderConfig(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_hidden=width,
        dropout_rate=dropout_rate,
    )


def joint(
    *,
    width: int = 64,
    device_width: int = 32,
    history_length: int = 50,
    row_tokens: int = 64,
    dropout_rate: float = 0.4,
    text_dimensions: int = 128,
    id_scale: float = 0.16,
    text_scale: float = 1.0,
    train: TrainConfig,
) -> RunConfig:
    """Cloud agent, device agent and planner."""
    system = SystemConfig(
        cloud=CloudConfig(
            decoder=_decoder(width, 2, dropout_rate),
            item_table=ItemTableConfig(id_scale=id_scale, text_scale=text_scale),
            history_length=history_length,
        ),
        device=DeviceConfig(decoder=_decoder(device_width, 1, dropout_rate / 2), history_length=history_length),
    )
    packing = PackingConfig(history_length=history_length, row_tokens=row_tokens, recent_share=0.15, profile_targets=0.5)
    return RunConfig(system=system, packing=packing, train=train, text_dimensions=text_dimensions)


def ml_1m() -> RunConfig:
    """MovieLens-1M: long histories, few items."""
    train = TrainConfig(
        epochs=24,
        rows_per_batch=20,
        learning_rate=5e-3,
        ema_decay=0.998,
        withheld_share=1.0,
        withheld_events=2,
        patience=4,
        final_steps=1500,
        final_events=12_288,
    )
    sizes = {"width": 128, "history_length": 200, "row_tokens": 201}
    return joint(**sizes, dropout_rate=0.2, text_dimensions=64, id_scale=1.0, text_scale=0.5, train=train)


def amazon_beauty() -> RunConfig:
    """Amazon Beauty: short histories, many items, telling text."""
    train = TrainConfig(epochs=14, rows_per_batch=16, learning_rate=2e-3, ema_decay=0.99, final_steps=1500, refit_trunks=True)
    return joint(width=128, dropout_rate=0.5, text_dimensions=256, text_scale=1.5, train=train)


def synthetic() -> RunConfig:
    """The synthetic world, in about a minute on two cores."""
    train = TrainConfig(
        epochs=7, rows_per_batch=32, learning_rate=4e-3, withheld_share=1.0, final_steps=500, final_events_per_step=32
    )
    return joint(width=32, device_width=16, dropout_rate=0.2, text_dimensions=32, train=train)


def tiny() -> RunConfig:
    """Seconds, for tests and examples."""
    train = TrainConfig(
        epochs=2,
        rows_per_batch=24,
        learning_rate=4e-3,
        withheld_per_step=4,
        decider_interval=1,
        context_draws=2,
        final_steps=6,
        final_events_per_step=8,
        validation_users=128,
        policy_steps=0,
    )
    return joint(width=16, device_width=8, history_length=15, row_tokens=16, text_dimensions=16, dropout_rate=0.1, train=train)


SASREC_LEARNING_RATE = 4e-3  # 2e-3 is worse on amazon-beauty and 8e-3 is as good, on validation (LOG)


def sasrec(base: RunConfig) -> RunConfig:
    """SASRec (Kang and McAuley, arXiv 1808.09781) with full cross-entropy, on ids alone: the cloud decoder of a preset."""
    system = SystemConfig(
        cloud=CloudConfig(
            decoder=base.system.cloud.decoder,
            item_table=ItemTableConfig(id_scale=base.system.cloud.item_table.id_scale, text_dropout_rate=0.0),
            history_length=base.system.cloud.history_length,
        ),
        device=None,
    )
    packing = PackingConfig(
        history_length=base.packing.history_length, row_tokens=base.packing.row_tokens, recent_share=0.0, profile_targets=0.0
    )
    # Ids converge half as fast as text does, and an epoch of one agent at one level costs less than half of a joint one.
    train = replace(base.train, epochs=round(1.5 * base.train.epochs), learning_rate=SASREC_LEARNING_RATE)
    return RunConfig(system=system, packing=packing, train=train, text_dimensions=0, k_core=base.k_core)


WITHHELD_EVENTS = 10_000  # that the deciders should have


def default(interactions: Interactions) -> RunConfig:
    """For data without a preset, by two facts: events per user (how far back) and events per item (how much text counts)."""
    events = interactions.num_interactions
    long_histories, well_known_items = events >= 80 * interactions.num_users, events >= 40 * interactions.num_items
    history_length = 100 if long_histories else 50
    row_tokens = 101 if long_histories else 64
    # The head needs thousands of withheld events more than the trunks need the newest 3% of long histories (LOG).
    share = float(np.clip(WITHHELD_EVENTS / interactions.num_users, 0.3, 1.0))
    per_user = max(1, min(WITHHELD_EVENTS, round(0.03 * events)) // interactions.num_users)
    withheld = share * per_user * interactions.num_users
    train = TrainConfig(
        epochs=int(np.clip(6_000_000 // events, 6, 25)),
        rows_per_batch=(4096 if events >= 300_000 else 1024) // row_tokens,
        learning_rate=4e-3 if well_known_items else 2e-3,
        patience=8,  # with few validation users, three evaluations without a better one come by chance (LOG)
        withheld_share=share,
        withheld_events=per_user,
        # The deciders see each withheld event some 15 times, if there are many.
        final_steps=int(np.clip(withheld * 15 / 64, 300, 1500)),
        refit_trunks=withheld > 0.02 * events,
    )
    sizes = {"width": 128, "history_length": history_length, "row_tokens": row_tokens}
    if well_known_items:
        return joint(**sizes, dropout_rate=0.2, text_dimensions=64, id_scale=1.0, train=train)
    return joint(**sizes, train=train)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "amazon-beauty": amazon_beauty,
    "ml-1m": ml_1m,
    "synthetic": synthetic,
    "tiny": tiny,
}
AUTO, SASREC = "auto", "sasrec"


def preset(name: str, source: str = SYNTHETIC) -> RunConfig:
    """The configuration of that name.

    ``"auto"`` is the preset that has the name of the data, or ``default`` for other data (which is read to know its size).
    ``"sasrec"`` is the baseline with the sizes of ``"auto"``, and ``"sasrec-NAME"`` the one with those of the preset NAME.

    Raises:
        UserError: there is no such preset; the data cannot be read.
    """
    if name == SASREC or name.startswith(f"{SASREC}-"):
        return sasrec(preset(name.removeprefix(SASREC).removeprefix("-") or AUTO, source))
    if name == AUTO:
        own = PRESETS.get(source_name(source))
        return own() if own else default(read_interactions(source))
    if name not in PRESETS:
        close = difflib.get_close_matches(name, [*PRESETS, AUTO, SASREC], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown preset {name!r}: {hint}choose one of {', '.join(PRESETS)}, {AUTO}, {SASREC}, {SASREC}-NAME")
    return PRESETS[name]()
