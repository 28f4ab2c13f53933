"""How a system is trained."""

from dataclasses import dataclass
from typing import Literal

from cda4rec_jax.planner import Objective

ComputeDtype = Literal["auto", "float32", "bfloat16"]
NextItemLoss = Literal["full", "sampled", "in-batch"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation of the trunks (both agents' decoders and the item table) and of the deciders (fusion head and policy)."""

    seed: int = 0
    epochs: int
    rows_per_batch: int
    # Parts into which a batch's rows are cut, one after the other. The gradient is that of the whole; negatives are those of a part.
    accumulation_steps: int = 1
    compute_dtype: ComputeDtype = "auto"  # of the decoders' products; auto: bfloat16 on GPU and TPU, float32 on CPU
    learning_rate: float
    final_learning_rate_share: float = 0.05  # of the cosine schedule
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 5.0
    ema_decay: float = 0.0  # of the trunk weights that are evaluated and saved; 0 takes the weights themselves
    loss: NextItemLoss = "full"  # what the trunks' loss is normalised over: all items, drawn ones, or the targets of a batch
    sampled_items: int = 1024  # of the loss "sampled": draws of one step, which all tokens of an agent share
    label_smoothing: float = 0.0  # share of the label that goes from the target to all items, under any of these losses
    loss_chunk: int | None = None  # tokens whose logits exist at a time; None leaves it to the kernel
    max_seconds: float = 0.0  # stop training the trunks after so much wall time, each time that they are trained; 0 has no limit
    patience: int = 3  # evaluations without a better validation ndcg@10
    evaluations_per_epoch: float = 1.0
    validation_users: int = 4096  # for early stopping; the final evaluation takes all
    checkpoint_minutes: float = 2.0  # 0 saves after every step

    decider_learning_rate: float = 4e-3
    withheld_share: float = 0.3  # of the users whose newest training events teach the deciders and no trunk ...
    withheld_events: int = 1  # ... so many of each
    refit_trunks: bool = False  # train the trunks again in the end, on withheld events too, under the deciders that were trained
    withheld_per_step: int = 16
    decider_interval: int = 4  # joint steps from one that moves the deciders to the next; their part costs as much as the trunks'
    context_draws: int = 4  # contexts per withheld user
    objective: Objective = Objective.EXACT  # of the planner
    planner_start_share: float = 0.3  # m(t) = 0 before this share of the steps
    quality_regression: float = 0.05  # weight of the squared error of q_theta, which keeps its terms in units of quality
    entropy_start: float = 0.1  # beta(t), in units of dQ, linear from here ...
    entropy_end: float = 0.005  # ... to here
    practice_share: float = 0.5  # final lambda of rho = (1 - lambda) uniform + lambda pi
    final_steps: int = 300  # planner-only steps at the end, with frozen trunks
    final_events: int = 8192  # withheld events whose candidates are kept in memory for them, about .2 MB each
    final_events_per_step: int = 64
    final_ndcg_weight: float = 15.0  # of a smoothed ndcg beside the fusion head's cross-entropy in them
    policy_steps: int = 800  # of the policy alone in the very end, on validation events before the finished agents; 0 takes none
    policy_learning_rate: float = 1e-3  # in them; less than a policy takes that starts anew
