"""Configs of mm projects: find and read them, and turn a distilled config back into the plain student's."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config import utils as config_utils
from mmengine.registry import Registry
from mmengine.utils import is_installed

from kdgraft.errors import DistillError, UnsafeCheckpoint, nearest
from kdgraft.sources import students_in

PLUGINS = {"DistilledDetector": "kdgraft_det", "DistilledSegmentor": "kdgraft_seg"}
"""The type of a distilled model -> the package that registers it."""
REPLAY = "ReplayViews"
"""The type of the suite's hook."""
_OURS = ("student", "teacher", "teachers", "terms", "recipe", "inherit", "dry_run_size")


# mmengine looks up 'mmseg::…' in the distribution mmsegmentation. It does not find the fork, whose distribution has another
# name, but it does find the module.
if not is_installed(config_utils.MODULE2PACKAGE["mmseg"]):
    config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"


class MissingConfig(DistillError):
    """A config file is missing. This is an error when training starts, but not when a model is built for inference."""


def load_config(source: Any, *, imports: bool = True) -> Config:
    """Return the config of a source.

    Args:
        source: a path, a name such as ``"mmdet::gfl/gfl_r50_fpn_1x_coco.py"``, a dict or a :class:`Config`.
        imports: import the modules that a file lists in ``custom_imports``.

    Raises:
        MissingConfig: the file does not exist.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return Config({"model": dict(source)} if "type" in source else dict(source))
    return Config.fromfile(config_file(str(source)), import_custom_modules=imports)


def config_file(source: str) -> Path:
    """Return the file of a config that is named by its path or as ``"mmdet::…"``.

    Raises:
        MissingConfig: the file does not exist.
    """
    path = Path(_packaged(source) if "::" in source else source).expanduser()
    if not path.is_file():
        raise MissingConfig(f"config not found: {source}")
    return path


def _packaged(name: str) -> str:
    package, _, relative = name.partition("::")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingConfig(f"config not found: {name}; the package {package!r} is not installed")
    return str(Path(spec.origin).parent / ".mim" / "configs" / relative)


def model_of(config: Config) -> ConfigDict:
    """Return the ``model`` entry, with the top-level ``data_preprocessor`` moved into it as the Runner does.

    Raises:
        DistillError: the config has no ``model``.
    """
    if not isinstance(config.get("model"), Mapping):
        raise DistillError(f"config {config.filename or ''} has no 'model' with a type and its settings")
    model = ConfigDict(config.model)
    if config.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", config.data_preprocessor)
    return plain_model(model)


def type_name(model: Mapping[str, Any]) -> str:
    """Return the bare name of a ``model`` entry's type, given as ``"GFL"``, ``"mmdet.GFL"``, a dotted path or the class."""
    kind = model.get("type")
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def is_distilled(model: Mapping[str, Any]) -> bool:
    """Return true for a ``model`` entry of this suite, or of a plugin that is built like it."""
    return type_name(model).startswith("Distilled") and "student" in model


def scope_of(config: Config) -> str:
    """Return the registry scope of the host that trains a config.

    It is the config's ``default_scope``. In the scope of a project on top of a host it follows from the model's type, and is
    MMDetection's unless that says otherwise.
    """
    if config.get("default_scope") in ("mmdet", "mmseg"):
        return str(config.default_scope)
    return "mmseg" if type_name(config.get("model") or {}) == "DistilledSegmentor" else "mmdet"


def imported_names(config: Config) -> list[str]:
    """Return the modules that a config lists in ``custom_imports``."""
    names = (config.get("custom_imports") or {}).get("imports", [])
    return [names] if isinstance(names, str) else list(names)


def plain_model(model: ConfigDict) -> ConfigDict:
    """Return the student's own ``model`` entry, or the entry itself when it is not a distilled model."""
    if not is_distilled(model):
        return model
    rest = {key: value for key, value in model.items() if key not in (*_OURS, "type")}
    return student_config(model["student"], rest)


def student_config(student: Any, rest: Mapping[str, Any]) -> ConfigDict:
    """Return the student's ``model`` entry from ``student=`` (a type or a whole model) and the entries beside it.

    Raises:
        DistillError: ``student`` is a whole model, and there are entries beside it as well.
    """
    if isinstance(student, str) or callable(student):
        return ConfigDict(type=student, **rest)
    if not isinstance(student, Mapping):
        raise DistillError(f"student must be the type of a model or a whole model, got {student!r}")
    extra = [key for key in rest if key != "data_preprocessor"]
    if extra:
        raise DistillError(
            f"student is a whole model, so {', '.join(map(repr, extra))} must go into it; or name only its type: "
            f"student={student.get('type')!r}"
        )
    model = ConfigDict(student)
    for key, value in rest.items():
        model.setdefault(key, value)
    return model


def checked_model(model: ConfigDict, models: Registry, owner: str) -> ConfigDict:
    """Return a ``model`` entry, unless it cannot be meant.

    Args:
        model: the entry.
        models: the host's registry.
        owner: who has it, for messages.

    Raises:
        DistillError: no such model is registered, or its class takes no argument of this name.
    """
    kind = model.get("type")
    if not isinstance(kind, str) and not callable(kind):
        raise DistillError(f"{owner}: the type of a model must be a name, got {kind!r}")
    with models.switch_scope_and_registry(model.get("_scope_")) as registry:  # as in building it
        found: Any = registry.get(kind) if isinstance(kind, str) else kind
        if found is None:
            similar = nearest(str(kind), registry.module_dict)
            raise DistillError(f"{owner}: no model of {registry.scope} is called {kind!r}{similar}")
    taken = inspect.signature(found).parameters
    if all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
        for key in model:
            if key not in (*taken, "type", "_scope_"):
                raise DistillError(
                    f"{owner}: a {found.__name__} takes no argument {key!r}{nearest(key, (*_OURS, *taken))}"
                )
    return model


def plain_config(config: Config) -> Config:
    """Return the config of the plain student, which does not mention this suite."""
    plain = Config(config.to_dict())
    plain.model = plain_model(plain.model)
    kept = [name for name in imported_names(plain) if name.partition(".")[0] not in PLUGINS.values()]
    if kept:
        plain.custom_imports = {**plain.custom_imports, "imports": kept}
    elif plain.get("custom_imports"):
        plain.pop("custom_imports")
    hooks = list(plain.get("custom_hooks") or ())
    left = [hook for hook in hooks if not (isinstance(hook, Mapping) and type_name(hook) == REPLAY)]
    if left:
        plain.custom_hooks = left
    elif hooks:
        plain.pop("custom_hooks")
    return plain


def peer_config(config: Config, peer: str, source: str, *, files: bool = False) -> Config:
    """Return the plain config of a distilled run, with a peer in the student's place.

    Args:
        config: the config of the run.
        peer: the peer's name among the run's teachers.
        source: the origin of the config, for messages.
        files: also read, and thereby execute, a peer's config that is a file.

    Raises:
        DistillError: the run has no such peer.
        UnsafeCheckpoint: the peer's config is a file, and ``files`` is false.
    """
    model = config.get("model") or {}
    given = dict(model.get("teachers") or {"teacher": model.get("teacher")}) if is_distilled(model) else {}
    peers: dict[str, Any] = {}
    for name, spec in given.items():
        peers |= {f"{name}{end}": one for end, one in students_in(spec).items()}
    if peer not in peers:
        raise DistillError(f"{source} has no peer {peer!r}{nearest(peer, peers)}")
    told = peers[peer].get("config")
    if not isinstance(told, Mapping) and not files:
        raise UnsafeCheckpoint(
            f"the config of the peer in {source} is the file {told}, which reading it would execute; if it is yours, say --trusted"
        )
    plain = plain_config(config)
    plain.model = model_of(load_config(told, imports=False))
    return plain


class _Literals(ast.NodeTransformer):
    """Replaces the two notations in mmengine's config texts that are not literals by literals."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace ``dict(a=1)`` and ``dict({'a': 1})`` by dict literals."""
        self.generic_visit(node)
        entries, named = [arg for arg in node.args if isinstance(arg, ast.Dict)], [k.arg for k in node.keywords]
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or entries != node.args or None in named:
            return node
        keys = [*(key for entry in entries for key in entry.keys), *map(ast.Constant, named)]
        return ast.Dict(keys, [*(v for entry in entries for v in entry.values), *(k.value for k in node.keywords)])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Replace the dotted path of a class, which mmengine writes for ``type=`` where a config holds the class, by its text."""
        path = ast.unparse(node)
        return ast.Constant(path) if all(part.isidentifier() for part in path.split(".")) else node


def literal_config(text: str, source: str) -> Config:
    """Read the config that a checkpoint carries as text, without executing or importing anything.

    Args:
        text: assignments, as :attr:`mmengine.Config.pretty_text` writes them.
        source: the origin of the text, for the message.

    Raises:
        UnsafeCheckpoint: the text holds more than assignments of literals.
        DistillError: the text is not a config.
    """
    entries: dict[str, Any] = {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DistillError(f"the config in {source} cannot be read: {error}") from None
    for statement in tree.body:
        try:
            assert isinstance(statement, ast.Assign)
            (target,) = statement.targets
            assert isinstance(target, ast.Name)
            entries[target.id] = ast.literal_eval(_Literals().visit(statement.value))
        except (AssertionError, ValueError, TypeError, RecursionError):
            raise UnsafeCheckpoint(
                f"the config in {source} holds more than literals, which reading it would execute "
                f"(line {statement.lineno}: {' '.join(ast.unparse(statement).split())[:80]}); if you made it yourself, say --trusted"
            ) from None
    try:
        return Config(entries)
    except KeyError as error:
        raise DistillError(f"the config in {source} cannot be read: {error.args[0]}") from None


def executed_config(text: str, source: str) -> Config:
    """Read the config in ``text`` by executing it as code. Use this only for files that the user trusts.

    Raises:
        DistillError: the code raises an error.
    """
    try:
        return Config.fromstring(text, file_format=".py")
    except Exception as error:  # the code can raise anything
        raise DistillError(f"the config in {source} cannot be read: {type(error).__name__}: {error}") from error
