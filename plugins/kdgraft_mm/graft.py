"""The graft: a built student gets a subclass of its own class, with the distiller as a child module.

As with torch's ``fully_shard``, the model stays an instance of the student's class. Everything that the host does to its own
models (initialise, wrap, average, save, validate, infer) it does to the student; only ``loss`` in training is extended.
"""

from __future__ import annotations

import logging
import traceback
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import Registry as MMRegistry
from torch import Tensor

from kdgraft.classes import class_order
from kdgraft.distiller import HostDistiller, Replay
from kdgraft.errors import DistillError, WiringError, check_number, nearest
from kdgraft.hiding import hide_from_state_dict
from kdgraft.isolation import isolated_rng
from kdgraft.regions import Batch
from kdgraft.registry import Registry, check_told, expand_recipe
from kdgraft.taps import Tap
from kdgraft.teacher import Teacher
from kdgraft.terms import TapTerm, Term

from .checkpoints import SAFE_TYPES
from .configs import MissingConfig, load_config, model_of, student_config
from .log import tell_the_run
from .resolution import Resolution, Size, samples_padded_to, teacher_scale
from .state import HubLink
from .views import TeacherView

logger = logging.getLogger("kdgraft")

DRY_RUN_SIZES = (128, 256, 512)


class DryRunFailed(WiringError):
    """A model cannot run on the example of the dry run."""


class Grafting(ABCMeta):
    """Calling a graft class builds the student and returns *it*, grafted."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        return cls.build(*args, **settings)  # type: ignore[attr-defined]


@cache
def _graft_class(graft: Any, student: Any) -> Any:
    return Grafting(f"Distilled{student.__name__}", (graft, student), {"__module__": graft.__module__})


if TYPE_CHECKING:
    from mmengine.model import BaseModel as _Host
else:
    _Host = object


class Graft(_Host, metaclass=Grafting):
    """Base of ``DistilledDetector`` and ``DistilledSegmentor``."""

    # Underscored: on the built model they must not stand before the student's own submodules.
    _models: ClassVar[MMRegistry]
    _terms: ClassVar[Registry]
    _recipes: ClassVar[Registry]
    _fields: ClassVar[frozenset[str]] = frozenset()
    _replay: ClassVar[Replay | None] = None
    _scales: ClassVar[bool] = False  # whether the teacher may have its own resolution

    distiller: HostDistiller | None

    @classmethod
    def build(
        cls,
        student: Any = None,
        teacher: Any = None,
        terms: Any = None,
        recipe: Any = None,
        inherit: Any = (),
        dry_run_size: int | None = None,
        **model: Any,
    ) -> Any:
        """Builds the student as the host would and grafts the distiller on.

        Args:
            student: the student's type, with the rest of its model beside (``**model``), or its whole model.
            teacher: ``dict(config=…, checkpoint=…)``; see :func:`build_teacher`. With ``scale=2.0`` the training pipeline delivers
                the teacher's images, and the student is trained on the same view at half their size.
            terms: a list of terms.
            recipe: a recipe's name, or ``dict(type=name, …)`` to change its settings; its terms come before ``terms``.
            inherit: modules whose weights the student takes over from the teacher before training, where the two are alike: a
                path or a list of them, such as ``"bbox_head"`` (the inheriting strategy of FGD, arXiv 2111.11837).
            dry_run_size: side of the square input of the dry run, in pixels. By default 128, or 256 or 512 where a model cannot
                run on so little (900 queries need as many positions).
        """
        tell_the_run()
        if dry_run_size is not None:
            check_number(cls.__name__, "dry_run_size", dry_run_size, 1, whole=True)
        if student is None:
            raise DistillError(f"{cls.__name__} needs student=…: the type of the model beside it, or a whole model")
        if not isinstance(terms, (list, tuple, type(None))):
            raise DistillError(f"terms must be a list, got {terms!r}")
        if not isinstance(inherit, (str, list, tuple)):
            raise DistillError(f"inherit must be a path of a module or a list of them, got {inherit!r}")
        check_told(terms, recipe, teacher=teacher)
        paths = (inherit,) if isinstance(inherit, str) else tuple(inherit)
        grafted = cls._models.build(student_config(student, model))
        specs = [*cls.expand(recipe), *(terms if terms is not None else [])]
        cls._check_scale(teacher, bool(specs))
        link = HubLink()
        if paths and not specs:
            raise DistillError(
                "inherit takes weights from the teacher of a distillation; give it terms or a recipe as well"
            )
        with isolated_rng():
            distiller, view, resolution, problem = None, None, None, None
            if specs:
                try:
                    distiller, view, resolution = cls._distiller(grafted, teacher, specs, dry_run_size)
                    check_inheritance(grafted, distiller.teacher.model, paths)
                except MissingConfig as error:
                    problem = error
        grafted.__class__ = _graft_class(cls, type(grafted))  # type: ignore[arg-type]
        # A plain attribute for what is no module; mmengine's modules take it as any object.
        grafted._distill = _Link(link, view, resolution, problem, paths)
        if distiller is not None:
            hide_from_state_dict(distiller)
        grafted.add_module("distiller", distiller)
        return grafted

    @classmethod
    def expand(cls, recipe: Any) -> list[Any]:
        """The terms of a recipe."""
        return expand_recipe(recipe, cls._recipes)

    @classmethod
    def _check_scale(cls, teacher: Any, distils: bool) -> None:
        """Raises a :class:`DistillError` for a resolution of the teacher's own that cannot be had."""
        if teacher_scale(teacher) == 1:
            return
        if not cls._scales:
            raise DistillError(
                f"{cls.__name__} takes no teacher scale: labels of pixels are not brought to the student's size; leave it out"
            )
        if not distils:
            raise DistillError(
                f"{cls.__name__}: without terms the student would not be reduced by the teacher's scale; leave scale out and "
                "resize in the pipeline"
            )

    @classmethod
    def _distiller(
        cls, student: Any, teacher: Any, specs: list[Any], size: int | None
    ) -> tuple[HostDistiller, TeacherView, Resolution | None]:
        built = build_teacher(teacher, cls._models)
        theirs = built.model.get_submodule("data_preprocessor")
        view = TeacherView(student.data_preprocessor, theirs)
        scale = teacher_scale(teacher)
        resolution = Resolution.of(scale, student.data_preprocessor, theirs) if scale != 1 else None
        *smaller, largest = DRY_RUN_SIZES if size is None else (size,)
        for side in smaller:
            with suppress(DryRunFailed):
                return cls._wired(student, built, specs, len(view.scale), side, scale), view, resolution
        return cls._wired(student, built, specs, len(view.scale), largest, scale), view, resolution

    @classmethod
    def _wired(
        cls, student: Any, teacher: Teacher, specs: list[Any], channels: int, size: int, scale: Fraction
    ) -> HostDistiller:
        """A distiller wired by a dry run on ``size`` × ``size`` pixels; of the teacher on ``scale`` times as many a side."""
        distiller = HostDistiller(teacher, specs, cls._terms)
        example = torch.randn(1, channels, size, size)
        large = round(size * scale)
        larger = torch.randn(1, channels, large, large) if scale != 1 else example

        def run(model: Any, owner: str, example: Tensor) -> Any:
            side = example.shape[-1]
            taps = [tap for term in distiller.terms.values() for tap in getattr(term, f"{owner}_taps")]
            try:
                if all(tap.below("backbone") or tap.below("neck") for tap in taps):
                    return model.extract_feat(example)  # untrained heads find a thousand objects to look at
                return model(example, cls._example_samples(side), mode="tensor")
            except (DistillError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                said = str(error).partition("\n")[0] or _where(error)
                raise DryRunFailed(
                    f"the dry run of the {owner}, a {type(model).__name__}, on {side}×{side} pixels failed "
                    f"({type(error).__name__}: {said}); see that its parts fit together (in_channels), or set dry_run_size to a "
                    "size that it can run on"
                ) from error

        distiller.wire(
            student,
            lambda: run(student, "student", example),
            lambda: run(teacher.model, "teacher", larger),
            cls._fields,
            {"teacher_scale": float(scale)},
            cls._replay,
        )
        return distiller

    @classmethod
    def _example_samples(cls, size: int) -> Any:
        return None

    # What the host calls.

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """The host's losses, and in training ``distill.<term>.loss`` beside them.

        Where the teacher has a resolution of its own, the batch is in training the teacher's, and the host's losses those of
        the reduced one.
        """
        link = self._distill
        delivered = inputs, data_samples
        if self.training and link.resolution is not None:
            inputs, data_samples = self._reduced(inputs, data_samples, link.resolution)
        if self.distiller is None or not self.training or not torch.is_grad_enabled():
            if self.training:
                link.raise_problem()
            return super().loss(inputs, data_samples)  # type: ignore[misc]
        distiller = self.distiller
        link.hub.sync(distiller)
        batch = self._batch(inputs, data_samples)
        if not link.ready:
            self.start_distilling()
        batch.class_order = link.order_on(inputs.device)
        batch.teacher_scale = link.scale
        step = link.hub.step()
        teacher = None
        if distiller.active(step):
            view, samples = link.view(*delivered, (inputs.shape[-2], inputs.shape[-1]))
            model = distiller.teacher.model
            teacher = distiller.record_teacher(lambda: model(view, samples, mode="tensor"), inputs.device.type)
        with distiller.record_student(self) as student:  # type: ignore[arg-type]
            losses = super().loss(inputs, data_samples)  # type: ignore[misc]
        if teacher is not None:
            teacher = distiller.replay_teacher(student, teacher, batch, inputs.device.type)
        distilled = distiller.losses(student, teacher, batch, step, inputs.device)
        mix(losses, distiller.host_shares(step))
        losses.update(distilled)
        return losses

    def init_weights(self) -> None:
        """The student's own initialisation, then what it inherits. Called when training starts: loads the teacher."""
        self._distill.raise_problem()
        if self.distiller is not None:
            self.distiller.teacher.load()
        with self._without_distiller():
            super().init_weights()  # type: ignore[misc]
        if self.distiller is not None:
            for path in self._distill.inherit:
                theirs = self.distiller.teacher.model.get_submodule(path).state_dict()
                self.get_submodule(path).load_state_dict(theirs)  # type: ignore[attr-defined]

    def start_distilling(self, classes: Any = None) -> None:
        """What needs the teacher's weights or the training set, before the first step: loads it, compares class names.

        Args:
            classes: the student's class names; those of the Runner's training set by default.

        Raises:
            DistillError: the teacher's file is missing or does not fit, or its classes are others.
        """
        link = self._distill
        link.raise_problem()
        if self.distiller is None:
            return
        self.distiller.teacher.load()
        terms = self.distiller._all_terms()
        still = [term.name for term in terms if term.schedule.by_epoch and link.hub.info("max_epochs") == 1]
        if still:
            raise DistillError(
                f"{', '.join(still)}: a schedule by='epoch' never moves in a run of one epoch, which is what "
                "IterBasedTrainLoop counts; use by='iter'"
            )
        self._compare_classes(self.distiller, classes)
        link.ready = True

    def _compare_classes(self, distiller: HostDistiller, classes: Any) -> None:
        """Finds out how the teacher's classes come into the student's order; refuses what takes them as they are."""
        link, terms = self._distill, distiller._all_terms()
        paired = [term.name for term in terms if self._pairs_classes(term, distiller.teacher.model)]
        if not (link.inherit or paired or any(term.compares_classes for term in terms)):
            return
        meta = link.hub.info("dataset_meta") or {}
        link.order = class_order(classes or meta.get("classes"), teacher_classes(distiller.teacher))
        if link.inherit and link.order is not None:
            raise DistillError(
                "inherit takes over the teacher's outputs as they are, and its classes stand in another order than the "
                "student's; leave inherit out, or bring the data set's classes into the teacher's order"
            )
        if paired and link.order is not None:
            raise WiringError(
                f"{', '.join(paired)}: tapped at class outputs, whose channels are compared one by one, and the "
                "teacher's classes stand in another order than the student's; use SoftTargets there (of a segmentor "
                "PixelSoftTargets), or bring the data set's classes into the teacher's order"
            )

    def _pairs_classes(self, term: Term, teacher: Any) -> bool:
        """Whether a term on features is tapped at class outputs, whose order it does not know."""
        if term.compares_classes or not isinstance(term, TapTerm):
            return False
        sides = (self, term.student_taps), (teacher, term.teacher_taps)
        return any(self._reads_classes(model, tap) for model, taps in sides for tap in taps)

    @staticmethod
    def _reads_classes(model: Any, tap: Tap) -> bool:
        """Whether the channels of what a tap reads stand for classes."""
        return False

    @contextmanager
    def _without_distiller(self) -> Iterator[None]:
        distiller = self._modules.pop("distiller", None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._modules["distiller"] = distiller  # type: ignore[attr-defined]

    def _batch(self, inputs: Tensor, data_samples: Any) -> Batch:
        """What terms may know of the host's batch; each task adds its own."""
        height, width = inputs.shape[-2:]
        return Batch(padded_size=(height, width), image_sizes=image_sizes(data_samples))

    def _reduced(self, inputs: Tensor, data_samples: Any, resolution: Resolution) -> tuple[Tensor, Any]:
        """The student's batch from the teacher's; nothing of the latter is changed."""
        raise NotImplementedError


class _Link:
    """What a graft holds beside its distiller."""

    def __init__(
        self,
        hub: HubLink,
        view: TeacherView | None,
        resolution: Resolution | None,
        problem: DistillError | None,
        inherit: tuple[str, ...],
    ) -> None:
        self.hub, self._view, self.resolution, self._problem, self.inherit = hub, view, resolution, problem, inherit
        self.ready = False
        self.order: Tensor | None = None

    def raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem

    @property
    def scale(self) -> float:
        """The teacher's image size over the student's."""
        return 1.0 if self.resolution is None else float(self.resolution.scale)

    def view(self, inputs: Tensor, samples: Any, padded: Size) -> tuple[Tensor, Any]:
        """The teacher's inputs and data samples for the batch that the pipeline delivered.

        Args:
            padded: (height, width) of the student's input.
        """
        assert self._view is not None
        view = self._view(inputs, image_sizes(samples))
        if self.resolution is None:
            return view, samples
        view = self.resolution.teacher_inputs(view, padded, self._view.pad_value)
        return view, samples_padded_to(samples, (view.shape[-2], view.shape[-1]))

    def order_on(self, device: torch.device) -> Tensor | None:
        if self.order is not None and self.order.device != device:
            self.order = self.order.to(device)
        return self.order


def _where(error: Exception) -> str:
    """The line that raised, of an error that says nothing."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.line} in {last.name}, {last.filename}"


def mix(losses: dict[str, Any], shares: Mapping[str, float]) -> None:
    """Multiplies the host's losses of these names by the shares that terms leave to them.

    A step may lack one: without proposals an RoI head has no class loss.
    """
    for name in shares.keys() & losses.keys():
        value, share = losses[name], shares[name]
        losses[name] = [part * share for part in value] if isinstance(value, list) else value * share


def image_sizes(samples: Any) -> list[Size]:
    """(height, width) of each image inside the padded batch."""
    return [tuple(sample.metainfo["img_shape"][:2]) for sample in samples]


def check_inheritance(student: Any, teacher: Any, paths: tuple[str, ...]) -> None:
    """Raises a :class:`WiringError` unless student and teacher have modules of the same shapes at these paths."""
    for path in paths:
        states = []
        for owner, model in (("student", student), ("teacher", teacher)):
            try:
                states.append(model.get_submodule(path).state_dict())
            except AttributeError:
                names = [name for name, _ in model.named_modules() if name]
                raise WiringError(f"inherit: the {owner} has no module {path!r}{nearest(path, names)}") from None
        ours, theirs = ({key: tuple(value.shape) for key, value in state.items()} for state in states)
        if ours != theirs:
            key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
            raise WiringError(
                f"inherit: {path!r} differs, {key} is {ours.get(key, 'missing')} in the student and {theirs.get(key, 'missing')} in "
                "the teacher; inherit only what is alike, such as a head on a pyramid of the same width"
            )


def build_teacher(spec: Any, models: MMRegistry) -> Teacher:
    """Builds a teacher's architecture; its weights are read when training starts.

    Args:
        spec: ``dict(config=…, checkpoint=…)`` with ``config`` a path, ``"mmdet::…"``, a model or a whole config, and
            optionally ``precision`` and ``trusted`` (see :class:`kdgraft.Teacher`) and ``scale`` (see :meth:`Graft.build`).
        models: the host's model registry.

    Raises:
        DistillError: something is missing or misspelt.
        MissingConfig: the config file is not there.
    """
    if not isinstance(spec, Mapping):
        raise DistillError(f"teacher must be dict(config=…, checkpoint=…), got {spec!r}")
    known = ("config", "checkpoint", "precision", "trusted", "scale")
    for key in spec:
        if key not in known:
            raise DistillError(f"teacher takes no argument {key!r}{nearest(key, known)}")
    for key in ("config", "checkpoint"):
        if not spec.get(key):
            raise DistillError(f"teacher needs {key}=…; write teacher=dict(config='…', checkpoint='teacher.pth')")
    config = load_config(spec["config"])
    imports = config.get("custom_imports")
    if imports and not config.filename:
        from mmengine.utils import import_modules_from_strings

        import_modules_from_strings(**imports)
    model = revert_sync_batchnorm(models.build(model_of(Config(config.to_dict()))))
    return Teacher(
        model,
        spec["checkpoint"],
        precision=spec.get("precision", "inherit"),
        trusted=bool(spec.get("trusted", False)),
        safe_types=SAFE_TYPES,
    )


def teacher_classes(teacher: Teacher) -> Any:
    """The class names that the teacher's checkpoint records, or ``None``."""
    meta = teacher.meta.get("dataset_meta") or teacher.meta
    return meta.get("classes") or meta.get("CLASSES")
