"""The graft: a built student becomes an instance of a subclass of its own class, with the distiller as a child module.

As with torch's ``fully_shard``, the model stays an instance of the student's class. The host treats the student as any model of
its own (it initialises, wraps, averages, saves, validates and infers); only ``loss`` does more, and only in training.
"""

from __future__ import annotations

import logging
import traceback
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmengine.logging import print_log
from mmengine.registry import Registry as MMRegistry
from torch import Tensor

from kdgraft import inheriting
from kdgraft.batch import Batch, Samples
from kdgraft.classes import class_order
from kdgraft.engine import Engine, Replay
from kdgraft.errors import DistillError, WiringError, check_number
from kdgraft.hiding import hide_from_state_dict
from kdgraft.isolation import isolated_rng
from kdgraft.readers import Reader
from kdgraft.registry import Registry, check_told, expand_recipe, listed
from kdgraft.sources import Source, Teacher
from kdgraft.taps import Tap
from kdgraft.telling import announced

from .class_outputs import check_examined, own_loss, pairs_classes
from .configs import MissingConfig, checked_model, student_config
from .context import GraftContext
from .log import tell_the_run
from .resolution import Resolution
from .sources import SourceView, build_sources, check_inheritance, check_scales, teacher_classes
from .state import HubLink
from .stored import Stored, check_stored
from .views import channels_of, image_sizes, sample_ids

logger = logging.getLogger("kdgraft")

DRY_RUN_SIZES = (128, 256, 512)


class DryRunFailed(WiringError):
    """A model cannot run on the example of the dry run."""


class GraftMeta(ABCMeta):
    """Metaclass of grafts: calling a graft class builds the student and returns *the student*, grafted."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        """Build and return the grafted student."""
        return cls.build(*args, **settings)  # type: ignore[attr-defined]


@cache
def _graft_class(graft: Any, student: Any) -> Any:
    return GraftMeta(f"Distilled{student.__name__}", (graft, student), {"__module__": graft.__module__})


if TYPE_CHECKING:
    from mmengine.model import BaseModel as _Host
else:
    _Host = object


class Graft(_Host, metaclass=GraftMeta):
    """Base of ``DistilledDetector`` and ``DistilledSegmentor``."""

    # The underscores keep these names from hiding the student's own submodules on the built model.
    _models: ClassVar[MMRegistry]
    _terms: ClassVar[Registry]
    _recipes: ClassVar[Registry]
    _reader: ClassVar[type[Reader]]
    _fields: ClassVar[frozenset[str]] = frozenset()
    _replay: ClassVar[Replay | None] = None
    _scales: ClassVar[bool] = False  # true where the teacher may have its own resolution

    distiller: Engine | None

    @classmethod
    def build(
        cls,
        student: Any = None,
        teacher: Any = None,
        teachers: Any = None,
        terms: Any = None,
        recipe: Any = None,
        inherit: Any = (),
        dry_run_size: int | None = None,
        **model: Any,
    ) -> Any:
        """Build the student as the host would, and graft the distiller onto it.

        Args:
            student: the student's type, with the rest of its model beside it (``**model``), or its whole model.
            teacher: ``dict(config=…, checkpoint=…)``; see :func:`~kdgraft_mm.sources.build_teacher`. With ``scale=2.0`` the
                training pipeline delivers the teacher's images, and the student is trained on the same view at half their size.
            teachers: several sources by name, instead of ``teacher``: each as there, or ``dict(type="Ensemble", members=["a",
                "b"])``, ``dict(type="Peer", config=…)``, ``dict(type="Peers", models=[dict(config=…), …])``, ``dict(type="Itself",
                momentum=0.999)``. A term listens to the one that its ``source`` names, by default to ``"teacher"``.
            terms: a list of terms.
            recipe: a recipe's name, or ``dict(type=name, …)`` to change its settings. Its terms come before ``terms``.
            inherit: modules of equal shapes whose weights the student takes over from the teacher before training: a path or a
                list of them, such as ``"bbox_head"`` (the inheriting strategy of FGD, arXiv 2111.11837).
            dry_run_size: side of the square input of the dry run, at most 8192 pixels. By default 128, or 256 or 512 where a model cannot
                run on so few pixels (900 queries need as many positions).
            **model: the other entries of the student's model.
        """
        tell_the_run()
        if student is None:
            raise DistillError(f"{cls.__name__} needs student=…: the type of the model beside it, or a whole model")
        cls._check_settings(terms, inherit, dry_run_size)
        check_told(terms, recipe, teacher=teacher, teachers=teachers)
        paths = (inherit,) if isinstance(inherit, str) else tuple(inherit)
        grafted = cls._models.build(checked_model(student_config(student, model), cls._models, "student"))
        specs = [*cls.expand(recipe), *(terms if terms is not None else [])]
        check_scales(cls.__name__, teacher, teachers, cls._scales, bool(specs))
        if paths and not specs:
            raise DistillError(
                "inherit takes weights from the teacher of a distillation; give it terms or a recipe as well"
            )
        engine, context = None, GraftContext(HubLink(), {}, None, paths, set(), recipe)
        with isolated_rng():
            if specs:
                try:
                    sources = build_sources(teacher, teachers, cls._models)
                    context.views = {name: SourceView(grafted, source) for name, source in sources.items()}
                    cls._check_student(grafted)
                    engine, context.pairing = cls._engine(grafted, sources, specs, dry_run_size)
                    cls._check_wired(grafted, engine)
                    check_inheritance(grafted, sources, paths)
                    check_stored(engine)
                except MissingConfig as error:
                    context.problem = error
        grafted.__class__ = _graft_class(cls, type(grafted))  # type: ignore[arg-type]
        grafted.distill_context = context  # no module, so that no state_dict contains it
        if engine is not None:
            hide_from_state_dict(engine)
        grafted.add_module("distiller", engine)
        return grafted

    @classmethod
    def _check_settings(cls, terms: Any, inherit: Any, dry_run_size: Any) -> None:
        """Raise a :class:`DistillError` for an argument of the wrong type."""
        if dry_run_size is not None:
            check_number(cls.__name__, "dry_run_size", dry_run_size, 1, 8192, whole=True)
        listed(terms)
        if not isinstance(inherit, (str, list, tuple)):
            raise DistillError(f"inherit must be a path of a module or a list of them, got {inherit!r}")

    @classmethod
    def expand(cls, recipe: Any) -> list[Any]:
        """Return the terms of a recipe."""
        return expand_recipe(recipe, cls._recipes)

    @classmethod
    def _engine(
        cls, student: Any, sources: dict[str, Source], specs: list[Any], size: int | None
    ) -> tuple[Engine, set[str]]:
        """Return an engine, wired by a dry run at the smallest size that the models can run on; see :meth:`_wired`."""
        *smaller, largest = DRY_RUN_SIZES if size is None else (size,)
        for side in smaller:
            with suppress(DryRunFailed):
                return cls._wired(student, sources, specs, side)
        return cls._wired(student, sources, specs, largest)

    @classmethod
    def _wired(cls, student: Any, sources: dict[str, Source], specs: list[Any], size: int) -> tuple[Engine, set[str]]:
        """Return an engine, wired by a dry run on ``size`` × ``size`` pixels, and ``scale`` times as many a side for sources.

        Returns:
            The engine, and the names of the terms on features that are tapped at class outputs and do not know their order.
        """
        engine = Engine(sources, specs, cls._terms, reader=cls._reader)
        channels = channels_of(student.data_preprocessor)
        example = torch.randn(1, channels, size, size)
        scale = max(source.scale for source in sources.values())
        large = round(size * scale)
        larger = torch.randn(1, channels, large, large) if scale != 1 else example

        def run(model: Any, owner: str, taps: Sequence[Tap], example: Tensor) -> Any:
            side = example.shape[-1]
            try:
                if hasattr(model, "extract_feat") and all(tap.below("backbone") or tap.below("neck") for tap in taps):
                    return model.extract_feat(example)  # untrained heads would process a thousand objects
                return cls._raw_outputs(model, example, cls._example_samples(side))
            except (DistillError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                said = str(error).partition("\n")[0] or _where(error)
                if cls._trains(model, example):
                    raise WiringError(
                        f"the {owner}, a {type(model).__name__}, cannot run without ground truth ({type(error).__name__}: {said}), "
                        "and so neither in a dry run nor as a teacher; tap its backbone or neck"
                    ) from error
                raise DryRunFailed(
                    f"the dry run of the {owner}, a {type(model).__name__}, on {side}×{side} pixels failed "
                    f"({type(error).__name__}: {said}); see that its parts fit together (in_channels), or set dry_run_size to a "
                    "size that it can run on"
                ) from error

        def run_source(source: Source) -> Any:
            owner = "teacher" if source.name == "teacher" else f"source {source.name!r}"
            return run(source.model, owner, engine.taps(source.name), larger if source.scale != 1 else example)

        wirings = engine.wire(
            student,
            lambda: run(student, "student", engine.taps("student"), example),
            run_source,
            cls._given(student),
            {"samples": len(example)},
            replay=cls._replay,
        )
        terms = [term for term in engine.all_terms if pairs_classes(term, wirings[term.name], cls._reads_classes)]
        return engine, {term.name for term in terms}

    @classmethod
    def _check_student(cls, student: Any) -> None:
        """Raise a :class:`WiringError` for a student that no term can distil."""

    @classmethod
    def _check_wired(cls, student: Any, engine: Engine) -> None:
        """Raise a :class:`WiringError` for terms that the student's own settings rule out."""

    @classmethod
    def _given(cls, student: Any) -> frozenset[str]:
        """Return the fields of :class:`Batch` that a batch of this student fills."""
        return cls._fields

    @classmethod
    def _example_samples(cls, size: int) -> Any:
        """Return the data samples of the dry run's single image, with ground truth."""
        return None

    @classmethod
    def _raw_outputs(cls, model: Any, inputs: Tensor, samples: Any) -> Any:
        """Run a model up to its heads' outputs, without losses and without post-processing."""
        return model(inputs, samples, mode="tensor")

    @classmethod
    def _trains(cls, model: Any, example: Tensor) -> bool:
        """Return true for a model that can compute its losses, although it cannot run otherwise."""
        try:
            model.loss(example, cls._example_samples(example.shape[-1]))
        except Exception:
            return False
        return True

    # The host calls the following methods.

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """Return the host's losses and, in training, ``distill.<term>.loss`` beside them.

        Where the teacher has its own resolution, a training batch has the teacher's resolution, and the host's losses are those
        of the reduced batch.
        """
        context = self.distill_context
        delivered = inputs, data_samples
        if self.training and context.resolution is not None:
            inputs, data_samples = self._reduced(inputs, data_samples, context.resolution)
        if self.distiller is None or not self.training or not torch.is_grad_enabled():
            if self.training:
                context.raise_problem()
            return super().loss(inputs, data_samples)  # type: ignore[misc]
        engine = self.distiller
        context.hub.sync(engine)
        if not context.ready:
            self.start_distilling()
        reduced = inputs, data_samples

        def run(source: Source) -> Any:
            view, samples = context.views[source.name](delivered, reduced)
            if isinstance(source, Stored):
                return view, samples
            model: Any = source.model
            return model.loss(view, samples) if source.trains else self._raw_outputs(model, view, samples)

        def judge(source: Source) -> Tensor:
            return own_loss(source.model, *context.views[source.name](delivered, reduced))

        def batch(model: Any) -> Batch:
            return self._batch(*reduced, model)

        with engine.step(self, batch, context.hub.step(), run, inputs.device, run_loss=judge) as step:  # type: ignore[arg-type]
            losses = super().loss(inputs, data_samples)  # type: ignore[misc]
        losses.update(step.losses(losses))
        context.figures = step.figures
        for name, own in step.outputs.items():
            step.share_out(own, name)
            losses.update({f"peer.{name}.{key}": value for key, value in own.items()})
        return losses

    def parse_losses(self, losses: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return the host's sum of the losses, and its log with ``distill.<term>.raw`` and ``.weight`` in addition."""
        total, logged = super().parse_losses(losses)
        logged.update(self.distill_context.take_figures())
        return total, logged

    def init_weights(self) -> None:
        """Load the teacher, initialise the student as the host does, and copy the modules that it inherits."""
        self.distill_context.raise_problem()
        if self.distiller is not None:
            self.distiller.load()
        with self._without_distiller():
            super().init_weights()  # type: ignore[misc]
        if self.distiller is not None:
            with isolated_rng():
                for peer in self.distiller.peers.values():
                    peer.init_weights()  # type: ignore[operator]
            if self.distill_context.inherit:
                paths = self.distill_context.inherit
                inheriting.inherit(self, self.distiller.teacher.model, paths)  # type: ignore[type-var]

    def start_distilling(self, classes: Any = None) -> None:
        """Load the teacher and compare class names. This happens before the first step, as it needs weights and training set.

        Args:
            classes: the student's class names; by default those of the Runner's training set.

        Raises:
            DistillError: the teacher's file is missing or does not fit, or the teacher has other classes.
        """
        context = self.distill_context
        context.raise_problem()
        if self.distiller is None:
            return
        self.distiller.load()
        terms = self.distiller.all_terms
        still = [term.name for term in terms if term.schedule.by_epoch and context.hub.info("max_epochs") == 1]
        if still:
            raise DistillError(
                f"{', '.join(still)}: a schedule by='epoch' never moves in a run of one epoch, which is what "
                "IterBasedTrainLoop counts; use by='iter'"
            )
        for source in self.distiller.sources.values():
            if isinstance(source, Teacher):
                self._compare_classes(source, classes)
        context.ready = True
        print_log(announced(self.distiller, self, context.recipe), "current")

    def _compare_classes(self, teacher: Teacher, classes: Any) -> None:
        """Find the permutation of a teacher's classes into the student's order; refuse terms that cannot apply it."""
        context, engine = self.distill_context, self.distiller
        assert engine is not None
        terms = [term for term in engine.all_terms if teacher.name in engine.members(term.source)]
        paired = [term.name for term in terms if term.name in context.pairing]
        if not (context.inherit or paired or any(term.compares_classes or term.examines for term in terms)):
            return
        meta = context.hub.info("dataset_meta") or {}
        teacher.class_order = class_order(classes or meta.get("classes"), teacher_classes(teacher))
        check_examined(terms, teacher)
        if context.inherit and teacher.class_order is not None:
            raise DistillError(
                "inherit takes over the teacher's outputs as they are, and its classes stand in another order than the "
                "student's; leave inherit out, or bring the data set's classes into the teacher's order"
            )
        if paired and teacher.class_order is not None:
            raise WiringError(
                f"{', '.join(paired)}: tapped at class outputs, whose channels are compared one by one, and the teacher's classes "
                "stand in another order than the student's; use SoftTargets there, or bring the data set's classes into the "
                "teacher's order"
            )

    @staticmethod
    def _reads_classes(model: Any, tap: Tap, tensor: Tensor) -> bool:
        """Return true where the channels of a tapped tensor stand for classes."""
        return False

    @contextmanager
    def _without_distiller(self) -> Iterator[None]:
        distiller, self.distiller = self.distiller, None
        try:
            yield
        finally:
            self.distiller = distiller

    def _batch(self, inputs: Tensor, data_samples: Any, model: Any = None) -> Batch:
        """Return the data that terms may use of a batch of a model, by default the student; each task adds its own."""
        height, width = inputs.shape[-2:]
        names = sample_ids(data_samples)
        samples = None if names is None else Samples(names)
        return Batch(padded_size=(height, width), image_sizes=image_sizes(data_samples), samples=samples)

    def _reduced(self, inputs: Tensor, data_samples: Any, resolution: Resolution) -> tuple[Tensor, Any]:
        """Return the student's batch, made from the teacher's, which stays unchanged."""
        raise NotImplementedError


def _where(error: Exception) -> str:
    """Describe the line that raised an error, for errors without a message."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.line} in {last.name}, {last.filename}"
