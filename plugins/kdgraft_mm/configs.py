"""Configs of mm projects: finding them, and turning a distilled one back into the plain student's."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config import utils as config_utils
from mmengine.utils import is_installed

from kdgraft.errors import DistillError, UnsafeCheckpoint, nearest

PLUGINS = {"DistilledDetector": "kdgraft_det", "DistilledSegmentor": "kdgraft_seg"}
"""What registers the models that configs name."""
_OURS = ("student", "teacher", "teachers", "terms", "recipe", "inherit", "dry_run_size")


# mmengine takes 'mmseg::…' to the distribution mmsegmentation; installed under the fork's name it would not be found, and the
# module of the same name is.
if not is_installed(config_utils.MODULE2PACKAGE["mmseg"]):
    config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"


class MissingConfig(DistillError):
    """A config file that is not there: an error when training starts, none of a model built for inference."""


def load_config(source: Any, *, imports: bool = True) -> Config:
    """A config from a path, ``"mmdet::gfl/gfl_r50_fpn_1x_coco.py"``, a dict or a :class:`Config`.

    Args:
        source: see above.
        imports: whether a file's ``custom_imports`` are imported.

    Raises:
        MissingConfig: no such file.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return Config({"model": dict(source)} if "type" in source else dict(source))
    return Config.fromfile(config_file(str(source)), import_custom_modules=imports)


def config_file(source: str) -> Path:
    """The file of a config named by its path or as ``"mmdet::…"``.

    Raises:
        MissingConfig: no such file.
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
    """The ``model`` entry, with the top-level ``data_preprocessor`` in it as the Runner puts it there.

    Raises:
        DistillError: the config has none.
    """
    if not isinstance(config.get("model"), Mapping):
        raise DistillError(f"config {config.filename or ''} has no 'model' with a type and its settings")
    model = ConfigDict(config.model)
    if config.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", config.data_preprocessor)
    return plain_model(model)


def type_name(model: Mapping[str, Any]) -> str:
    """The bare name of a ``model`` entry's type: of ``"GFL"``, ``"mmdet.GFL"``, a dotted path, or the class itself."""
    kind = model.get("type")
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def is_distilled(model: Mapping[str, Any]) -> bool:
    """Whether a ``model`` entry is one of this suite's, or of a plugin built like it."""
    return type_name(model).startswith("Distilled") and "student" in model


def plain_model(model: ConfigDict) -> ConfigDict:
    """The student's own ``model`` entry: the same one when it is not a distilled model."""
    if not is_distilled(model):
        return model
    rest = {key: value for key, value in model.items() if key not in (*_OURS, "type")}
    return student_config(model["student"], rest)


def student_config(student: Any, rest: Mapping[str, Any]) -> ConfigDict:
    """The student's model from ``student=`` (a type, or a whole model) and the entries beside it.

    Raises:
        DistillError: ``student`` is a whole model and entries stand beside it as well.
    """
    if not isinstance(student, Mapping):
        return ConfigDict(type=student, **rest)
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


def plain_config(config: Config) -> Config:
    """The config of the undistilled student, free of this suite."""
    plain = Config(config.to_dict())
    plain.model = plain_model(plain.model)
    imports = plain.get("custom_imports")
    if imports:
        names = imports.get("imports", [])
        names = [names] if isinstance(names, str) else names
        kept = [name for name in names if name.partition(".")[0] not in PLUGINS.values()]
        if kept:
            plain.custom_imports = {**imports, "imports": kept}
        else:
            plain.pop("custom_imports")
    return plain


def peer_config(config: Config, peer: str, source: str, *, files: bool = False) -> Config:
    """The plain config of a distilled run in which a peer stands in the student's place.

    Args:
        config: of the run.
        peer: the peer's name among the run's teachers.
        source: what the config comes from, for messages.
        files: also read a peer's config that is a file, which executes it.

    Raises:
        DistillError: the run has no such peer.
        UnsafeCheckpoint: its config is a file, and ``files`` is false.
    """
    model = config.get("model") or {}
    given = dict(model.get("teachers") or {"teacher": model.get("teacher")}) if is_distilled(model) else {}
    peers = {name: spec for name, spec in given.items() if isinstance(spec, Mapping) and spec.get("type") == "Peer"}
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
    """Turns the two spellings of mmengine's config texts that are no literals into ones."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``dict(a=1)`` and ``dict({'a': 1})``."""
        self.generic_visit(node)
        entries, named = [arg for arg in node.args if isinstance(arg, ast.Dict)], [k.arg for k in node.keywords]
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or entries != node.args or None in named:
            return node
        keys = [*(key for entry in entries for key in entry.keys), *map(ast.Constant, named)]
        return ast.Dict(keys, [*(v for entry in entries for v in entry.values), *(k.value for k in node.keywords)])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """A class by its path, as mmengine writes ``type=`` of a config that held the class: its path as text."""
        path = ast.unparse(node)
        return ast.Constant(path) if all(part.isidentifier() for part in path.split(".")) else node


def literal_config(text: str, source: str) -> Config:
    """The config that a checkpoint carries as text, read without running or importing anything.

    Args:
        text: assignments, as :attr:`mmengine.Config.pretty_text` writes them.
        source: what it comes from, for the message.

    Raises:
        UnsafeCheckpoint: anything in it but assignments of literals.
        DistillError: it is no config.
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
    """The config in ``text``, run as the code that it is: only for what the user trusts.

    Raises:
        DistillError: it does not run.
    """
    try:
        return Config.fromstring(text, file_format=".py")
    except Exception as error:  # whatever code can raise
        raise DistillError(f"the config in {source} cannot be read: {type(error).__name__}: {error}") from error
