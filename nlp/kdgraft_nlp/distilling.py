"""The mixin that adds distillation to a Trainer: its step, its log, and checks of the Trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from kdgraft.balance import AutoWeight
from kdgraft.distributed import sum_over_ranks, world_size
from kdgraft.engine import Engine
from kdgraft.errors import DistillError, check_number
from kdgraft.isolation import eval_mode
from kdgraft.registry import check_told, expand_recipe, listed
from kdgraft.schedules import Step
from kdgraft.step import scaled

from .adapters import base_of
from .checkpoints import Resuming
from .chunked import tokens_at_once
from .class_teachers import check_class_data
from .collator import PREFIX, DistillCollator, take_weights
from .link import StudentStep, is_tied, link_of
from .on_policy import OnPolicy, read_on_policy
from .registry import RECIPES
from .sharding import refuse_sharded, refuse_sharding, refuse_uneven, shard_teachers, splits_weights
from .student import graft, is_fused, refuse_fused_liger, undistill
from .tokens import WEIGHTS, WRITTEN, tokens_of
from .views import check_views, viewed
from .vocabularies import check_tokenizer, vocabularies
from .weighing import refuse_weights, sum_of_weights
from .writer import Writer, written_figures
from .zero import prepare_teachers

logger = logging.getLogger("kdgraft")

LATEST = (".dropped", ".weight", ".share")
"""Suffixes of figures that are logged by their latest value instead of the mean over steps."""


class Distilling(Resuming):
    """The mixin before a Trainer class that runs the distillation in its steps."""

    _signature_columns: Any
    _writer: Writer | None = None
    _weights: str | None = None

    def start_distilling(
        self,
        teacher: Any = None,
        terms: Sequence[Any] | None = None,
        recipe: Any = None,
        dry_run: Mapping[str, Any] | None = None,
        chunked: bool | int = False,
        host_weight: float = 1.0,
        teachers: Mapping[str, Any] | None = None,
        init_from: Any = None,
        views: Any = None,
        on_policy: OnPolicy | Mapping[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        """Graft the distiller on the trainer's model; :class:`DistillTrainer` and :func:`distill` call it."""
        own = listed(terms)
        given = dict(dry_run=dry_run, init_from=init_from, on_policy=on_policy)
        check_told(terms, recipe, teacher=teacher, teachers=teachers, **given)
        _refuse_hosts(self)
        check_number("host_weight", "the host's share", host_weight, 0)
        specs = [*expand_recipe(recipe, RECIPES), *own]
        if host_weight != 1 and not specs:
            raise DistillError("host_weight is for distillation only; give terms or a recipe, or leave it out")
        self._weights = None if weights is None else take_weights(self, weights, bool(specs))
        others = list(teachers.values()) if isinstance(teachers, Mapping) else []
        told = read_on_policy(on_policy)
        split = splits_weights(self)
        cache = self.data_collator.cache if isinstance(self.data_collator, DistillCollator) else None
        refuse_uneven(split, told, cache)
        facts = vocabularies(self, [teacher] if teachers is None else others) | {"on_policy": told}
        self._recipe = recipe
        self._settings = dict(teacher=teacher, teachers=teachers, terms=specs, dry_run=dry_run, facts=facts)
        self._settings |= dict(init_from=init_from, chunk=_chunk_size(self, chunked), cache=cache)
        self._totals: dict[str, Tensor] = {}
        self._logged: dict[str, Tensor] = {}
        self._logged_in: dict[str, set[int]] = {}
        self._last_step = 0
        self._host_checked = self._told_of_labels = False
        self._host_weight = float(host_weight)
        self._graft(self.model)
        peers = []
        if self.distiller is not None:
            peers = [source for source in self.distiller.sources.values() if source.trains]
            try:
                self._check(self.distiller)
                check_class_data(self.distiller, views, self.train_dataset)
            except DistillError:
                undistill(self.model)
                raise
        self._views = views
        if views is not None:
            check_views(views, self.distiller.all_terms if self.distiller else (), link_of(self.model).takes)
        self._peers = [(peer, copy.deepcopy(peer.state())) for peer in peers if self.model_init is not None]
        self._new_parameters()

    def _check(self, engine: Engine) -> None:
        """Raise a :class:`DistillError` for sources and terms that this trainer cannot have."""
        sources = list(engine.sources.values())
        check_tokenizer(self, sources)
        split = splits_weights(self)
        if split:
            refuse_sharded(engine, split)
        if self._weights is not None:
            link, told = link_of(self.model), self._settings["facts"].get("on_policy")
            refuse_weights(engine, link.task, link.fused, _has_own_loss(self), told)
        if not _has_own_loss(self):
            return
        if any(source.trains for source in sources):
            raise DistillError("a peer trains on its model's own loss; leave out label smoothing and your own losses")
        auto = next((term.name for term in engine.all_terms if isinstance(term.balance, AutoWeight)), None)
        if auto is not None:
            raise DistillError(
                f"{auto}: weight='auto' compares with its model's own loss; leave out label smoothing and your own losses, or set "
                "weight to a number"
            )

    def _graft(self, model: Any) -> None:
        settings = dict(self._settings)
        # Terms are sized for one student: each student gets a copy, and the given terms stay unchanged.
        graft(model, settings.pop("teacher"), copy.deepcopy(settings.pop("terms")), **settings)
        link = link_of(model)
        link.hosted, link.host_weight = True, self._host_weight
        told = self._settings["facts"].get("on_policy")
        try:
            self._writer = None if told is None else Writer(told, self, model)
        except DistillError:
            undistill(model)
            raise

    def call_model_init(self, trial: Any = None) -> Any:
        """Build a new model, graft the distiller on it and reset the peers."""
        model = super().call_model_init(trial)
        if hasattr(self, "_settings"):
            for peer, first in self._peers:
                peer.load_state(first)
            self._graft(model)
        return model

    def _new_parameters(self) -> None:
        """Add the terms' parameters to an optimizer that already exists."""
        optimizer = self.optimizer
        if optimizer is None or self.distiller is None:
            return
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in self.distiller.parameters() if p.requires_grad and id(p) not in known]
        if not new:
            return
        if getattr(self, "lr_scheduler", None) is not None:
            raise DistillError(
                "the terms have trainable parameters, and this trainer has an optimizer and a scheduler; pass only the optimizer"
            )
        optimizer.add_param_group({"params": new})

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step, and count the terms' items over all of them."""
        if self.state.global_step >= self.state.max_steps > 0:
            # Resumed from the last step; within an epoch the host would run one more.
            self.control.should_training_stop = True
            return [], None
        if self._writer is not None:
            epoch_iterator = self._writer.batches(self.model, epoch_iterator, self.state.global_step)
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step < self._last_step:  # another run of the same trainer
            self._logged, self._logged_in = {}, {}
        self._last_step = self.state.global_step
        self._totals = {}
        if self.distiller is not None and found[0]:
            self._totals = self._count(found[0], device)
        return found

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        found = super()._get_num_items_in_batch(batch_samples, device)
        if found is None or self._weights is None or self.distiller is None:
            return found
        tokens = [tokens_of(link_of(self.model).read(batch)) for batch in batch_samples]
        return sum_of_weights(tokens, device, bool(self.args.average_tokens_across_devices))

    def written(self, batch: Any) -> Any:
        """Return a batch as an on-policy step has it; the batch itself where no step is on-policy."""
        writer = self._writer
        return batch if writer is None or not writer.settings.share else writer.written(self.model, batch, 0)

    def on_policy_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the terms' losses of an on-policy step on a batch, for the figures of a check; none where no step is one."""
        written = self.written(batch)
        if written is batch:
            return {}
        self.compute_loss(self.model.train(), dict(written))
        return {f"{key}, on-policy": value for key, value in link_of(self.model).last.losses.items()}

    def _count(self, batches: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """Return each term's number of items over the accumulated batch and all processes."""
        assert self.distiller is not None
        link = link_of(self.model)
        try:
            parts = [self.distiller.counts(link.read(batch)) for batch in batches]
        except DistillError:
            return {}  # a loss may make the inputs from these batches; if not, the pass raises the error
        names = sorted(set.intersection(*(set(part) for part in parts)))
        if not names:
            return {}
        sums = torch.stack([torch.stack([part[name].double().cpu() for part in parts]).sum() for name in names])
        return dict(zip(names, sum_over_ranks(sums.to(device)).unbind(), strict=True))

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **settings: Any) -> Tensor:
        """Run the host's training step, and raise a :class:`DistillError` where it did not distil."""
        self._distilled = False
        if self.distiller is not None:
            self._prepare_teachers(self.distiller)
        if self._views is not None and self.distiller is not None:
            names = [name for name, source in self.distiller.sources.items() if source.members == (name,)]
            inputs = viewed(self._views, inputs, [n for n in names if not self.distiller.sources[n].trains])
        loss = super().training_step(model, inputs, *args, **settings)
        if self.distiller is not None and not self._distilled:
            raise DistillError(
                f"{type(self).__name__}.compute_loss skips the distillation; call super().compute_loss(…), or distill(…) a Trainer that has it"
            )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the host's loss times its share, with the losses of terms and peers added in training."""
        if self.distiller is None or not model.training or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._weights is not None and WEIGHTS not in inputs:
            raise DistillError(
                f"there is no column {self._weights!r} for weights in the training set; add it, or leave out weights"
            )
        self._check_host(model, inputs, num_items_in_batch)
        state, scales = self.state, self._host_scales(num_items_in_batch)
        # Texts that the student wrote are no labels for the host's own loss.
        hard = link_of(self.model).host_weight = 0.0 if WRITTEN in inputs else self._host_weight
        parts = max(int(getattr(self, "current_gradient_accumulation_steps", 1) or 1), 1)
        factor = self._host_factor(num_items_in_batch)
        at = Step(state.global_step, int(state.epoch or 0))
        # The inputs are copied, as losses may remove the labels.
        step = StudentStep(at, dict(inputs), self._totals, parts, factor / (1 if scales else parts))
        written = inputs.get(WRITTEN)
        if written is not None and not student_chunks(self.model) and not _has_own_loss(self):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}  # without labels, no loss
        with link_of(self.model).asking(step):
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not step.passes:
            raise DistillError(f"{type(self).__name__}.compute_loss did not run the model; run it there to distil")
        self._distilled = True
        loss, split = self._weighted(result[0] if return_outputs else result, step), 1 if scales else parts
        # Peers train on the host's own loss, as the student does.
        peers = {f"peer.{name}.loss": scaled(value * factor, hard) for name, value in step.peers.items()}
        extra = torch.stack([value for key, value in step.losses.items() if key.endswith(".loss")]).sum()
        figures = {**step.losses, **{name: value / split for name, value in peers.items()}}
        if written is None:
            figures["task_loss"] = loss / split
        if self._writer is not None:
            figures |= written_figures(written, parts, loss.device)
        self._keep(figures)
        step.losses = {key: value.detach() for key, value in step.losses.items()}
        # The Trainer divides unscaled losses by the number of micro-batches; the terms' losses are scaled already.
        whole = sum(peers.values(), loss) + extra * split
        return (whole, result[1]) if return_outputs else whole

    def _prepare_teachers(self, engine: Engine) -> None:
        """Have teachers run as the wrapped student does, in parts where it is."""
        if self.is_fsdp_enabled:
            shard_teachers(engine)
        elif self.is_deepspeed_enabled:
            prepare_teachers(engine, self.accelerator.state.deepspeed_plugin)

    def _weighted(self, loss: Tensor, step: StudentStep) -> Tensor:
        """Return the host's loss times its share; a model that computes in chunks has already weighted it."""
        if (
            step.without_loss
            and link_of(self.model).host_weight
            and step.host_share
            and not self._told_of_labels
            and not loss.detach()
        ):
            self._told_of_labels = True
            logger.warning(
                "the batches have no labels: the host's own loss is 0, and only the terms train; set host_weight=0 to confirm this"
            )
        if student_chunks(self.model):
            return loss
        return scaled(loss, link_of(self.model).host_weight * step.host_share)

    def _check_host(self, model: nn.Module, inputs: Any, num_items: Any) -> None:
        """Warn once where the host sums the losses of micro-batches that its model did not scale; the terms' are scaled."""
        parts = int(getattr(self, "current_gradient_accumulation_steps", 1) or 1) * world_size()
        if self._host_checked or parts == 1 or student_chunks(self.model):
            return
        self._host_checked = True
        if num_items is None or _has_own_loss(self) or not self._host_scales(num_items):
            return
        student = base_of(self.model)
        given = link_of(student).of_student(inputs)
        with torch.no_grad(), eval_mode(student):  # through the host's wrapper, which may hold the weights in parts
            losses = [model(**given, num_items_in_batch=num_items * k)["loss"] for k in (1, 2)]
        if torch.equal(*losses) and self.is_world_process_zero():
            logger.warning(
                "%s ignores num_items_in_batch, so the Trainer sums its loss over the %d parts of a batch (accumulated batches and "
                "processes) instead of averaging it; the distillation losses are averaged",
                type(student).__name__,
                parts,
            )

    def _host_factor(self, num_items: Any) -> float:
        """Return the Trainer's factor of the model's loss against DDP's mean, by its own rule."""
        args = self.args
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func
        if not (args.average_tokens_across_devices and accepts and num_items is not None):
            return 1.0
        return float(self.accelerator.num_processes)

    def _host_scales(self, num_items: Any) -> bool:
        """Return whether the Trainer expects a loss that is scaled over the accumulated batch, by its own rule."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        accepts = self.model_accepts_loss_kwargs and num_items is not None
        return bool(accepts or self.compute_loss_func is not None)

    def _keep(self, figures: Mapping[str, Tensor]) -> None:
        for key, value in figures.items():
            value = value.detach().float()
            last = key.endswith(LATEST)
            self._logged[key] = value if last or key not in self._logged else self._logged[key] + value
            self._logged_in.setdefault(key, set()).add(self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        """Add the figures since the last log: means over steps, and the latest counts and weights."""
        if "loss" in logs and self._logged:
            weights = {name: value.item() for name, value in self._logged.items() if name.endswith(".weight")}
            names = sorted(self._logged.keys() - weights.keys())
            device = next(self.model.parameters()).device
            total = sum_over_ranks(torch.stack([self._logged[name] for name in names]).float().to(device))
            for name, value in zip(names, (total / world_size()).tolist(), strict=True):
                logs[name] = value if name.endswith(LATEST) else value / len(self._logged_in[name])
            logs.update(weights)
            self._logged, self._logged_in = {}, {}
        super().log(logs, *args, **settings)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **settings: Any) -> Any:
        """Run the host's prediction step on the student's inputs."""
        if is_tied(self.model):
            inputs = link_of(self.model).of_student(inputs)  # generation passes every input to the model
        return super().prediction_step(model, inputs, *args, **settings)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = list(self._signature_columns)
        if self.distiller is not None:
            taken = sorted(set().union(*link_of(self.model).sources.values()))
            columns += [*taken, *(PREFIX + name for name in taken)]
        if isinstance(self.data_collator, DistillCollator):
            columns += self.data_collator.columns
        self._signature_columns = list(dict.fromkeys(columns))


def student_chunks(model: Any) -> bool:
    """Return whether a student's own loss is computed in chunks, with those of the terms."""
    link = link_of(model)
    return link.chunk is not None and not link.fused


def _refuse_hosts(trainer: Any) -> None:
    if is_tied(trainer.model):
        raise DistillError("this trainer's model is already being distilled; build a new one, or undistill(model)")
    if trainer.args.n_gpu > 1:
        raise DistillError("one process cannot distil on several GPUs; start one per GPU with 'accelerate launch'")
    refuse_sharding(trainer)
    refuse_fused_liger(trainer.args)


def _chunk_size(trainer: Any, chunked: bool | int) -> int | None:
    if chunked is False:
        return None
    size = tokens_at_once(base_of(trainer.model)) if chunked is True else chunked
    check_number("chunked", "the number of tokens", size, 1, whole=True)
    if _has_own_loss(trainer) and not is_fused(base_of(trainer.model)):
        raise DistillError("chunked=True computes the cross-entropy; leave out label smoothing and your own losses")
    return size


def _has_own_loss(trainer: Any) -> bool:
    """Return whether the host's loss differs from the model's own."""
    kind = next(k for k in type(trainer).__mro__ if "compute_loss" in vars(k) and k is not Distilling)
    return trainer.label_smoother is not None or trainer.compute_loss_func is not None or kind is not Trainer
