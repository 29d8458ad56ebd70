"""Training an adapter: transformers' Trainer with the paper's recipe.

Checkpoints, resuming, logging, evaluation and early stopping are Trainer's own. What is added:

- checkpoints are adapter folders, which can be served as they are;
- logits are computed only where there are labels;
- bi-level optimisation: the activations' coefficients learn from a held-out part of the training
  data, the rest of the generators from the other part, in turns, first order (as in DARTS,
  arXiv 1806.09055);
- a guard that stops with advice when the training has diverged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from ..adapter import load_adapter
from ..errors import PedroError
from ..generator import VectorGenerator
from ..model import IGNORED_LABEL, PedroModel, takes_prompts
from .data import Example, held_out_split

# What a config must share with a checkpoint's for the parameters to mean the same.
_STRUCTURE = (
    "r",
    "target_modules",
    "pooling",
    "input_norm",
    "down_bias",
    "scope",
    "activation",
    "rational_order",
)

# Healthy runs have gradient norms below 100; diverging ones were seen between 1e6 and 1e9.
MAX_HEALTHY_NORM = 1e5
PATIENCE_STEPS = 5
LOSS_STEPS = 10
LOSS_RATIO = 3.0

# So many inputs keep the learning rate; see `fan_in_learning_rates`.
FAN_IN = 4


class TrainingDiverged(PedroError):
    """The loss or the gradients left all bounds; the message says what to try."""


@dataclass
class PedroTrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's defaults, and what PEDRO adds.

    Linear decay after a warm-up of 6 % of the steps, AdamW, no weight decay, learning rate 1e-4.

    Attributes:
        bilevel: learn the activations' coefficients on a held-out part of the training data.
        held_out_fraction: how large that part is.
        fan_in_learning_rates: scale the learning rates of W_down and W_up by four over their
            number of inputs, and the coefficients' by a tenth. A step of Adam moves every weight
            alike, so it moves what a matrix gives in proportion to its inputs: without this, what
            suits b_up is too much for W_up, the more so the higher r, and far too much for W_down
            (as in muP, arXiv 2203.03466).
        coefficient_range: X > 0 divides what a step moves a coefficient of degree j by X^j, so
            that it moves the activation alike at X whatever the degree. For activations whose
            inputs differ much from prompt to prompt, as they do after `start.condition`: one of 4
            counts 4,096-fold in the sixth power. 0: all degrees move alike.
        down_learning_rate: that of W_down, in place of what the above make it.
        coefficient_learning_rate: that of the coefficients, likewise.
        guard: stop when the training has diverged.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Warm-up steps, or, below 1, their share of all steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has no meaning here: rows have no columns."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume with the patience that was left."}
    )
    bilevel: bool = field(
        default=False,
        metadata={"help": "Learn the activations' coefficients on held-out training data."},
    )
    held_out_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training data held out for --bilevel."}
    )
    coefficient_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the activations' coefficients; as --learning-rate."}
    )
    down_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the down projection W_down; as --learning-rate."}
    )
    coefficient_range: float = field(
        default=0.0,
        metadata={"help": "Divide the steps of coefficients of degree j by its j-th power."},
    )
    fan_in_learning_rates: bool = field(
        default=False,
        metadata={"help": "Scale the generators' learning rates by their number of inputs."},
    )
    guard: bool = field(
        default=True, metadata={"help": "Stop when the loss or the gradients have exploded."}
    )


def is_coefficient(name: str) -> bool:
    """Whether a parameter of this name is one of an activation's."""
    return name.endswith((".activation.numerator", ".activation.denominator"))


def _kind_of(name: str) -> str:
    """The optimizer's group of a trainable parameter of this name."""
    if is_coefficient(name):
        return "coefficients"
    if not name.endswith(".weight"):
        return "biases"
    return "down" if name.endswith("down_proj.weight") else "up"


class Guard:
    """Watches losses and gradient norms for divergence.

    Args:
        advice: what the message tells to try.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._high_norms = 0
        self._first: list[float] = []
        self._recent: list[float] = []

    def see_loss(self, loss: float, step: int) -> None:
        """Take note of a step's loss.

        Raises:
            TrainingDiverged: it is not finite, or the last ten are far above the first ten.
        """
        if not math.isfinite(loss):
            raise self._diverged(step, f"the loss is {loss}")
        if len(self._first) < LOSS_STEPS:
            self._first.append(loss)
            return
        self._recent = [*self._recent[1 - LOSS_STEPS :], loss]
        first, recent = sum(self._first) / LOSS_STEPS, sum(self._recent) / LOSS_STEPS
        if len(self._recent) == LOSS_STEPS and recent > LOSS_RATIO * max(first, 1.0):
            raise self._diverged(
                step, f"the loss rose from {first:.3g} to {recent:.3g}, means of {LOSS_STEPS} steps"
            )

    def see_norm(self, norm: float, step: int) -> None:
        """Take note of a step's gradient norm, before the optimizer uses the gradients.

        Raises:
            TrainingDiverged: it is not finite, or was too high for five steps in a row.
        """
        if not math.isfinite(norm):
            raise self._diverged(step, f"the gradient norm is {norm}")
        self._high_norms = self._high_norms + 1 if norm > MAX_HEALTHY_NORM else 0
        if self._high_norms >= PATIENCE_STEPS:
            raise self._diverged(
                step,
                f"the gradient norm was above {MAX_HEALTHY_NORM:g} for {PATIENCE_STEPS} steps, "
                f"now {norm:.3g}",
            )

    def _diverged(self, step: int, what: str) -> TrainingDiverged:
        return TrainingDiverged(f"training diverged at step {step}: {what}. {self._advice}")


def advice_for(model: Any, args: PedroTrainingArguments) -> str:
    """What to try when a training of `model` diverges, the likeliest first."""
    advice = []
    if isinstance(model, PedroModel) and model.active_adapter is not None:
        config = model.pedro_configs[model.active_adapter]
        kinds = [config.activation] if isinstance(config.activation, str) else config.activation
        if config.r > 0 and config.input_norm is None:
            advice.append("input norm 'rms' (raw hidden states of real models are large)")
        if config.r > 0 and "rational" in kinds:
            advice.append("activation 'gelu' (a rational one has powers up to the sixth)")
    advice.append(f"a lower learning rate than {args.learning_rate:g}")
    if args.max_grad_norm <= 0:
        advice.append("clipping the gradients (max_grad_norm 1.0)")
    if args.fp16:
        advice.append("bf16 instead of fp16")
    return "Try " + ", or ".join(advice) + "."


class PedroTrainer(Trainer):
    """Trainer for a `PedroModel`, or, for comparison, a PEFT model on the same data.

    Args:
        model: the model; a `PedroModel` with a trainable active adapter.
        args: the settings.
        **kwargs: as Trainer takes them, and `held_out_dataset`, for the coefficients of a bi-level
            training, in place of a part of `train_dataset`. The collators of
            `vllm_pedro.training.collator` make batches from rows of `vllm_pedro.training.data`.

    Raises:
        PedroError: settings that cannot be, such as bi-level optimisation of an adapter whose
            activations have no coefficients.
    """

    def __init__(self, model: nn.Module, args: PedroTrainingArguments, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise PedroError(
                f"{args.n_gpu} GPUs in one process: start one process a GPU (torchrun), or choose "
                "one GPU with CUDA_VISIBLE_DEVICES"
            )
        self.optimizer: Any = None
        self._held_out: Any = None
        self._keeps_all_columns = False
        self._weights: list[nn.Parameter] = []
        self._coefficients: list[nn.Parameter] = []
        self._eval_loss, self._eval_tokens = 0.0, 0
        self.tokens_seen = 0
        if args.bilevel:
            held = kwargs.pop("held_out_dataset", None)
            kwargs["train_dataset"] = self._hold_out(model, args, kwargs.get("train_dataset"), held)
        elif kwargs.pop("held_out_dataset", None) is not None:
            raise PedroError("held-out data are for a bi-level training (--bilevel)")
        if isinstance(model, PedroModel) and not any(p.requires_grad for p in model.parameters()):
            raise PedroError(
                "the adapter has no parameter to train; PedroModel.from_pretrained(..., "
                "is_trainable=True) makes it trainable, set_adapter(name) one that is not active"
            )
        super().__init__(model=model, args=args, **kwargs)
        self._guard = Guard(advice_for(model, args)) if args.guard else None

    @property
    def settings(self) -> PedroTrainingArguments:
        return cast(PedroTrainingArguments, self.args)

    @property
    def step(self) -> int:
        """The optimizer step under way, counted from 1."""
        return int(self.state.global_step) + 1

    # ---- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy at the labels; logits are computed in the columns that have any."""
        inputs = dict(inputs)
        labels = inputs["labels"]
        if "prompt_lengths" in inputs:
            if not takes_prompts(self.accelerator.unwrap_model(model)):
                del inputs["prompt_lengths"]
            # A token is predicted in the column before its own.
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
            columns = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()
            if len(columns) > 0 and not self._keeps_all_columns:
                targets = targets[:, columns].contiguous()
                # Counted from the end: PEFT's virtual tokens stand in front.
                keep = columns - labels.shape[1]
                inputs |= {"logits_to_keep": keep, "labels": targets, "shift_labels": targets}
        result = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = cast(tuple[Tensor, Any], result)
        if not model.training:
            tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
            self._eval_loss += float(loss) * tokens
            self._eval_tokens += tokens
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, **how: Any
    ) -> Any:
        """Trainer's; predictions have a column for each of the labels'."""
        self._keeps_all_columns = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, **how)
        finally:
            self._keeps_all_columns = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with a loss that is the mean over tokens whatever the batches."""
        self._eval_loss, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self.args.world_size == 1 and self._eval_tokens and output.metrics:
            output.metrics[f"{prefix}_loss"] = self._eval_loss / self._eval_tokens
        return output

    # ---- batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's; lengths are those of our rows, which are no dictionaries that it can read."""
        data = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped or len(data) == 0 or not isinstance(data[0], Example):
            return super()._get_train_sampler(train_dataset)
        return _LengthGrouped(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=[len(data[i]) for i in range(len(data))],
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    # ---- a step

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch; before the first of a bi-level step, the coefficients' turn."""
        self.tokens_seen += _count_tokens(inputs)
        if not self.settings.bilevel:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            if self._outer_done < self.step:
                self._outer_step(model)
                self._outer_done = self.step
            with _only(self._weights, self._coefficients):
                loss = super().training_step(model, inputs, num_items_in_batch)
        if self._guard is not None:
            # With several micro-batches each one's loss is its share of the step's.
            self._guard.see_loss(float(loss) * self._micro_batches, self.step)
        return loss

    @property
    def _micro_batches(self) -> int:
        return int(getattr(self, "current_gradient_accumulation_steps", 1))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self._guard is not None and norm is not None:
            self._guard.see_norm(float(norm), self.step)
        return norm

    # ---- bi-level optimisation

    _outer_done = 0

    def _hold_out(
        self, model: nn.Module, args: PedroTrainingArguments, dataset: Any, held_out: Any
    ) -> Any:
        if not isinstance(model, PedroModel):
            raise PedroError("bilevel: only a PedroModel has activations to learn")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._coefficients = [p for name, p in named if is_coefficient(name)]
        self._weights = [p for name, p in named if not is_coefficient(name)]
        if not self._coefficients:
            raise PedroError(
                "bilevel: the adapter has no coefficients to learn; it needs activation "
                "'rational' and r above 0"
            )
        if args.fp16 or args.world_size > 1:
            raise PedroError("bilevel: neither fp16 nor more than one process is supported")
        if dataset is None:
            raise PedroError("bilevel: needs a train_dataset, to hold a part of it out")
        if held_out is not None:
            self._held_out = held_out
            return dataset
        kept, held = held_out_split(len(dataset), args.held_out_fraction, args.seed)
        self._held_out = Subset(dataset, held)
        return Subset(dataset, kept)

    def held_out_batch(self, step: int) -> list[Any]:
        """The held-out rows of one step, a function of seed and step alone, so of no history."""
        assert self._held_out is not None
        size, number = self.args.per_device_train_batch_size, len(self._held_out)
        rows = []
        for position in range((step - 1) * size, step * size):
            epoch, place = divmod(position, number)
            random = torch.Generator().manual_seed(self.args.seed + 1_000_003 * (epoch + 1))
            rows.append(self._held_out[int(torch.randperm(number, generator=random)[place])])
        return rows

    def _outer_step(self, model: nn.Module) -> None:
        """Update the coefficients alone, on a held-out batch."""
        model.train()
        batch = self._prepare_inputs(self.data_collator(self.held_out_batch(self.step)))
        with _only(self._coefficients, self._weights):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
            self.accelerator.backward(loss)
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self._coefficients, limit)
        if self._guard is not None:
            self._guard.see_norm(float(norm), self.step)
        # The same optimizer does both turns: it passes over parameters without a gradient.
        optimizer: Any = self.optimizer
        getattr(optimizer, "optimizer", optimizer).step()
        model.zero_grad()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; biases and coefficients do not decay."""
        target = self.model if model is None else model
        if self.optimizer is not None or not isinstance(target, PedroModel):
            return cast(torch.optim.Optimizer, super().create_optimizer(model))
        settings = self.settings
        rates = self._learning_rates(target)
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in target.named_parameters():
            if parameter.requires_grad:
                groups[_kind_of(name)].append(parameter)
        optimizer_class, how = self.get_optimizer_cls_and_kwargs(self.args, target)
        self.optimizer = optimizer_class(
            [
                {
                    "params": found,
                    "lr": rates[kind],
                    "weight_decay": settings.weight_decay if kind in ("down", "up") else 0.0,
                }
                for kind, found in groups.items()
                if found
            ],
            **how,
        )
        if settings.coefficient_range > 0 and groups["coefficients"]:
            _scale_steps(self.optimizer, groups["coefficients"], settings.coefficient_range)
        return cast(torch.optim.Optimizer, self.optimizer)

    def _learning_rates(self, model: PedroModel) -> dict[str, float]:
        """Of each kind of parameter; see `_kind_of`."""
        settings = self.settings
        rates = dict.fromkeys(("down", "up", "biases", "coefficients"), settings.learning_rate)
        name = model.active_adapter
        if settings.fan_in_learning_rates and name is not None:
            r = max(model.pedro_configs[name].r, 1)
            rates["down"] *= min(1.0, FAN_IN / model.shape.hidden_size)
            rates["up"] *= min(1.0, FAN_IN / r)
            rates["coefficients"] *= 0.1
        if settings.down_learning_rate is not None:
            rates["down"] = settings.down_learning_rate
        if settings.coefficient_learning_rate is not None:
            rates["coefficients"] = settings.coefficient_learning_rate
        return rates

    # ---- checkpoints are adapter folders

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, of a `PedroModel` as an adapter folder."""
        for module in self.model.modules():
            if isinstance(module, VectorGenerator):
                module.settle()  # in every process, where one alone writes
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not isinstance(self.model, PedroModel):
            super()._save(output_dir, state_dict)
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        self.model.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if isinstance(target, PedroModel):
            load_checkpoint(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PedroModel):
            load_checkpoint(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def load_checkpoint(model: PedroModel, path: str) -> None:
    """Fill a model's active adapter from an adapter folder of the same structure.

    Raises:
        AdapterError: the folder holds no adapter for this backbone.
        PedroError: the adapter there was made with other settings.
    """
    name = model.active_adapter
    if name is None:
        raise PedroError("no adapter is active")
    adapter = load_adapter(path, model.shape)
    ours, theirs = model.pedro_configs[name], adapter.config
    for key in _STRUCTURE:
        if getattr(ours, key) != getattr(theirs, key):
            raise PedroError(
                f"{path}: {key} is {getattr(theirs, key)!r} there and {getattr(ours, key)!r} here; "
                "resume with the settings that the training began with"
            )
    model.fill_adapter(name, adapter.tensors)


def _scale_steps(
    optimizer: torch.optim.Optimizer, coefficients: Sequence[nn.Parameter], limit: float
) -> None:
    """Let steps of the optimizer move coefficients of degree j by `limit^-j` of what they would.

    Scaling their gradients would do nothing, as Adam's steps do not depend on the gradients' size.

    Args:
        optimizer: the optimizer.
        coefficients: of numerators, which begin with degree 0, and denominators, in turns.
        limit: see `PedroTrainingArguments.coefficient_range`.
    """
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [parameter.detach().clone() for parameter in coefficients]

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for i, (parameter, old) in enumerate(zip(coefficients, before, strict=True)):
            degrees = torch.arange(len(parameter), device=parameter.device) + i % 2
            parameter.copy_(old + (parameter - old) * limit**-degrees)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(scale)


class _LengthGrouped(LengthGroupedSampler):
    """Batches of like length, in an order that depends on seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + 1_000_003 * self._epoch)
        return iter(super().__iter__())


class _only:
    """Lets some parameters alone require gradients, for a block."""

    def __init__(self, wanted: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
        self._wanted, self._others = wanted, others

    def __enter__(self) -> None:
        for parameter in self._others:
            parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for parameter in self._others:
            parameter.requires_grad_(True)


def _count_tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel())
