"""Teachers of features from other libraries, by a dict: Transformers, timm, torchvision, MMPretrain, or a function of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DistillError, check_flag, nearest
from ..pixels import Normalisation
from ..registry import SOURCES
from .features import Call, FeatureTeacher
from .mmpretrain import import_mmpretrain

_NORMALISATION = ("mean", "std", "pixel_range", "order")
_SETTINGS = ("type", "checkpoint", "precision", "trusted", "size", "patch", "prefix", *_NORMALISATION)


class Found(NamedTuple):
    """A network and the facts that its library knows of it; the user's own settings come before them."""

    network: nn.Module
    patch: int | None = None
    prefix: int = 0
    size: tuple[int, int] | None = None
    normalisation: Mapping[str, Any] | None = None
    load: Callable[[], dict[str, Tensor]] | None = None
    call: Call | None = None
    channels_last: bool = False


def library_teacher(
    spec: Mapping[str, Any],
    where: str = "teacher",
    *,
    images: Mapping[str, Any] | None,
    safe_types: Sequence[Any] = (),
) -> FeatureTeacher:
    """Build a teacher of features from a dict; its weights are read when training starts.

    ``type`` is one of

    * ``"transformers"`` with ``model=``: a folder that ``save_pretrained`` wrote, or the config of a model as a dict with its
      ``model_type``. The folder's image processor says the normalisation. Of a model of texts and images the part for images teaches;
    * ``"timm"`` with ``model=`` the name, and ``settings=`` further arguments of ``create_model``. Its config says the normalisation;
    * ``"torchvision"`` with ``model=`` the name, and ``settings=`` of ``get_model``;
    * ``"mmpretrain"`` with ``model=`` the name in its model zoo, and ``settings=`` of ``get_model``; or the config of a model as a dict
      with its ``type``. Its data preprocessor says the normalisation;
    * ``"module"`` with ``build="package.module:function"``, called with ``settings=``.

    Args:
        spec: the dict. Beside the keys above: ``checkpoint``, ``precision`` and ``trusted`` of a :class:`~kdgraft.Teacher`; ``patch``,
            ``prefix`` and ``size`` of a :class:`~kdgraft.FeatureTeacher`; ``mean``, ``std``, ``pixel_range`` and ``order`` of its
            normalisation. What the library knows may be left out.
        where: the name of the source in messages.
        images: the normalisation of the images that arrive; see :class:`~kdgraft.FeatureTeacher`.
        safe_types: see :class:`~kdgraft.Teacher`.

    Raises:
        DistillError: the library is not installed or has no such model, or a setting is missing, unknown or of no meaning.
    """
    kind = spec.get("type")
    if kind not in LIBRARIES:
        raise DistillError(f"{where}: no source has the type {kind!r}{nearest(str(kind), [*SOURCES, *LIBRARIES])}")
    build, own = _KINDS[kind]
    known = (*own, *_SETTINGS)
    for key in spec:
        if key not in known:
            raise DistillError(f"{where}, of type {kind!r}, takes no argument {key!r}{nearest(key, known)}")
    if not spec.get(own[0]):
        raise DistillError(
            f"{where} needs {own[0]}=…; write dict(type={kind!r}, {own[0]}='…', checkpoint='teacher.pth')"
        )
    settings = spec.get("settings", {})
    if not isinstance(settings, Mapping):
        raise DistillError(f"{where}: settings must be a dict of arguments, got {settings!r}")
    found = build(where, spec[own[0]], dict(settings))
    check_flag(where, "trusted", spec.get("trusted", False))
    checkpoint = spec.get("checkpoint")
    if found.load is None and not checkpoint and kind != "module":
        raise DistillError(f"{where} needs checkpoint=…, the file of its weights; an untrained teacher teaches nothing")
    if found.load is not None and checkpoint:
        raise DistillError(f"{where}: the folder {spec['model']} has its weights; leave checkpoint out")
    patch = spec.get("patch", found.patch)
    if patch is None:
        raise DistillError(
            f"{where} needs patch=…, the pixels by token, or of a convolutional network its largest stride"
        )
    return FeatureTeacher(
        found.network,
        checkpoint,
        normalisation=_normalisation(where, spec, found.normalisation),
        images=images,
        patch=patch,
        prefix=spec.get("prefix", found.prefix),
        size=spec.get("size", found.size),
        load=found.load,
        call=found.call,
        channels_last=found.channels_last,
        precision=spec.get("precision", "inherit"),
        trusted=spec.get("trusted", False),
        safe_types=safe_types,
    )


def _normalisation(where: str, spec: Mapping[str, Any], found: Mapping[str, Any] | None) -> Normalisation:
    given = {key: spec[key] for key in _NORMALISATION if key in spec}
    return Normalisation.read(where, given or found or {})


def _library(where: str, name: str) -> Any:
    """Import a library; raise a :class:`DistillError` where it is missing or broken."""
    if find_spec(name) is None:
        raise DistillError(f"{where}: type={name!r} needs the library: pip install {name}")
    try:
        return import_module(name)
    except Exception as error:  # a build for another torch fails in its own ways
        said = str(error).partition("\n")[0]
        raise DistillError(
            f"{where}: {name} cannot be imported ({type(error).__name__}: {said}); install the build for your torch"
        ) from error


def _built(where: str, kind: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise DistillError(f"{where}: {kind} cannot be built ({type(error).__name__}: {said})") from error


def _one_side(side: Any) -> int:
    """Return the side of square patches; 0 for others."""
    sides = tuple(side) if isinstance(side, (tuple, list)) else (side,)
    return int(sides[0]) if len(set(sides)) == 1 else 0


def _transformers(where: str, model: Any, settings: dict[str, Any]) -> Found:
    library = _library(where, "transformers")
    folder = None if isinstance(model, Mapping) else Path(str(model)).expanduser()
    if folder is not None and not (folder / "config.json").is_file():
        raise DistillError(
            f"{where}: {model} is no folder of a model with a config.json; download it and give its folder"
        )
    if folder is None and not model.get("model_type"):
        raise DistillError(
            f"{where}: the config of a model needs its model_type; write model=dict(model_type='dinov3_vit', …)"
        )

    def make() -> Any:
        read = library.AutoConfig.from_pretrained  # code in a folder is never executed
        config = library.AutoConfig.for_model(**model) if folder is None else read(folder, trust_remote_code=False)
        return library.AutoModel.from_config(config, trust_remote_code=False)

    network = _of_images(_built(where, f"transformers' {model}", make))
    config = network.config
    if network.main_input_name != "pixel_values":
        raise DistillError(
            f"{where}: a {type(network).__name__} reads {network.main_input_name}, no images; take a model of vision"
        )
    stages = hasattr(config, "depths")
    takes = signature(network.forward).parameters

    def call(network: nn.Module, images: Tensor, states: bool) -> tuple[Any, Any]:
        asked = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        found = network(pixel_values=images, output_hidden_states=states, **asked)
        return found.last_hidden_state, found.hidden_states

    classes = any(name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in network.named_parameters())
    return Found(
        network,
        patch=32 if stages else _one_side(getattr(config, "patch_size", None) or 0) or None,
        prefix=int(classes) + (getattr(config, "num_register_tokens", 0) or 0),
        normalisation=None if folder is None else _processor(folder),
        load=None if folder is None else lambda: _weights(where, library, folder),
        call=call,
    )


def _of_images(model: Any) -> Any:
    """Return the part for images of a model of texts and images, else the model."""
    return model.vision_model if hasattr(model, "vision_model") and hasattr(model, "text_model") else model


def _processor(folder: Path) -> dict[str, Any] | None:
    """Return the normalisation that a folder's image processor says; ``None`` if there is none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = folder / name
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        said = said.get("image_processor", said)
        if "image_mean" not in said:
            continue
        scale = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        if not said.get("do_normalize", True):
            said = said | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        mean, std = ([value / scale for value in said[key]] for key in ("image_mean", "image_std"))
        return {"mean": mean, "std": std, "pixel_range": 255}
    return None


def _weights(where: str, library: Any, folder: Path) -> dict[str, Tensor]:
    """Return the weights in a folder, from which no layer but an unused pooler may be missing."""
    settings = dict(output_loading_info=True, local_files_only=True, trust_remote_code=False)
    model, told = _built(where, str(folder), lambda: library.AutoModel.from_pretrained(folder, **settings))
    problems = [
        f"{len(keys)} {kind.partition('_')[0]}: {', '.join(sorted(map(str, keys))[:4])}"
        for kind in ("missing_keys", "mismatched_keys")
        if (keys := [key for key in told.get(kind, ()) if "pooler." not in str(key)])
    ]
    if problems:
        raise DistillError(
            f"checkpoint {folder} does not fit the teacher {type(model).__name__}; {'; '.join(problems)}"
        )
    found: dict[str, Tensor] = _of_images(model).state_dict()
    return found


def _timm(where: str, model: Any, settings: dict[str, Any]) -> Found:
    library = _library(where, "timm")
    network = _built(where, f"timm's {model}", lambda: library.create_model(model, pretrained=False, **settings))
    told: Any = network.pretrained_cfg
    embedding: Any = getattr(network, "patch_embed", None)
    return Found(
        network,
        patch=int(network.feature_info[-1]["reduction"]) if getattr(network, "feature_info", None) else None,
        prefix=getattr(network, "num_prefix_tokens", 0),
        size=tuple(embedding.img_size) if getattr(embedding, "strict_img_size", False) else None,
        normalisation={"mean": list(told["mean"]), "std": list(told["std"])},
        call=lambda network, images, states: (network.forward_features(images), None),  # type: ignore[operator]
        channels_last=str(getattr(network, "output_fmt", "")).endswith("NHWC"),
    )


def _torchvision(where: str, model: Any, settings: dict[str, Any]) -> Found:
    library = _library(where, "torchvision")
    network = _built(where, f"torchvision's {model}", lambda: library.models.get_model(model, weights=None, **settings))
    side = getattr(network, "image_size", None)
    return Found(
        network,
        patch=getattr(network, "patch_size", 32),
        prefix=int(hasattr(network, "class_token")),
        size=None if side is None else (side, side),
    )


def _mmpretrain(where: str, model: Any, settings: dict[str, Any]) -> Found:
    library = import_mmpretrain(where)
    if isinstance(model, Mapping) and (settings or "type" not in model):
        raise DistillError(
            f"{where}: the config of a model needs its type and no settings; write model=dict(type='ImageClassifier', …)"
        )

    def make() -> Any:
        with import_module("mmengine.registry").DefaultScope.overwrite_default_scope("mmpretrain"):
            if isinstance(model, Mapping):
                return import_module("mmpretrain.registry").MODELS.build(dict(model))
            return library.get_model(model, pretrained=False, **settings)

    network = _built(where, f"mmpretrain's {model['type'] if isinstance(model, Mapping) else model}", make)
    network.eval()  # which returns nothing in MMPretrain's backbones
    backbone = _trunk(network)
    # Classifiers want one vector of an image, and a teacher of features the map before it.
    if getattr(backbone, "out_type", None) in ("cls_token", "avg_featmap"):
        backbone.out_type = "featmap"
    if getattr(backbone, "gap_before_final_norm", False):
        backbone.gap_before_final_norm = False
    return Found(
        network,
        patch=_stride(where, network),
        prefix=getattr(backbone, "num_extra_tokens", 0),
        normalisation=_preprocessed(getattr(network, "data_preprocessor", None)),
        call=_last_map,
    )


def _last_map(network: Any, images: Tensor, states: bool) -> tuple[Any, None]:
    """Run the backbone of a model of MMPretrain, and return the last of its outputs."""
    found = _trunk(network)(images)
    return (found[-1] if isinstance(found, (tuple, list)) else found), None


def _stride(where: str, network: Any) -> int:
    """Return the pixels by position of a backbone's last map; raise a :class:`DistillError` where it gives none."""
    backbone = _trunk(network)
    kind, size = type(backbone).__name__, getattr(backbone, "img_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    with torch.no_grad():
        last, _ = _built(where, kind, lambda: _last_map(network, torch.zeros(1, 3, height, width), False))
    if not isinstance(last, Tensor) or last.ndim != 4:
        raise DistillError(f"{where}: a {kind} gives no map of an image, which teaches features by place")
    return round(height / last.shape[-2])


def _trunk(network: Any) -> Any:
    """Return the backbone of a model of MMPretrain, or the model where it is one itself."""
    found = getattr(network, "backbone", None)
    return network if found is None else found


def _preprocessed(preprocessor: Any) -> dict[str, Any] | None:
    """Return the normalisation of a data preprocessor of MMPretrain; ``None`` if it has none."""
    if not getattr(preprocessor, "_enable_normalize", False):
        return None
    mean, std = (getattr(preprocessor, name).flatten().tolist() for name in ("mean", "std"))
    return {"mean": mean, "std": std, "pixel_range": 255, "order": "rgb" if preprocessor.to_rgb else "bgr"}


def _module(where: str, build: Any, settings: dict[str, Any]) -> Found:
    name, _, function = str(build).partition(":")
    if not name or not function:
        raise DistillError(f"{where}: build must be 'package.module:function', got {build!r}")

    def make() -> Any:
        return getattr(import_module(name), function)(**settings)

    network = _built(where, str(build), make)
    if not isinstance(network, nn.Module):
        raise DistillError(f"{where}: {build} must return a torch module, got {type(network).__name__}")
    return Found(network, patch=None)


_KINDS: dict[str, tuple[Callable[[str, Any, dict[str, Any]], Found], tuple[str, ...]]] = {
    "transformers": (_transformers, ("model",)),
    "timm": (_timm, ("model", "settings")),
    "torchvision": (_torchvision, ("model", "settings")),
    "mmpretrain": (_mmpretrain, ("model", "settings")),
    "module": (_module, ("build", "settings")),
}
LIBRARIES = tuple(_KINDS)
"""The types of :func:`library_teacher`."""
