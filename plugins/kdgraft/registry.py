"""Registries of the names in config files: terms, losses, regions, schedules and recipes, open to third parties.

A third-party package adds to a registry either with the decorator::

    from kdgraft import TERMS

    @TERMS.register
    class MyTerm(Term): ...

or through an entry point of the registry's group (``kdgraft.terms`` and so on), which needs no import of the package.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn, TypeVar, overload

from .errors import DistillError, nearest
from .listing import arguments_of, first_line, needs_written, written

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Maps a name to a class or a function.

    Args:
        kind: the kind of its entries, such as ``"term"``, for messages.
        group: the entry-point group for third parties; loaded on the first look-up.
        parent: the registry to search for names that are missing here; a task's registry extends the core's.
        home: ``package:VARIABLE``: the package that registers names here, and the name of this registry in it. The first look-up
            imports the package; descriptions are read from its sources without an import.

    Example:
        >>> tricks = Registry("trick", "example.tricks")
        >>> @tricks.register
        ... class Flip: ...
        >>> tricks.build(dict(type="Flop"))
        Traceback (most recent call last):
        kdgraft.errors.DistillError: no trick is called 'Flop'; did you mean 'Flip'?
    """

    def __init__(
        self,
        kind: str,
        group: str,
        parent: Registry | None = None,
        home: str = "",
    ) -> None:
        self.kind = kind
        self.group = group
        self.parent = parent
        self._package, _, self._variable = home.partition(":")
        self._own: dict[str, Callable[..., Any]] = {}
        self._broken: dict[str, BaseException] = {}
        self._loaded = False

    @overload
    def register(self, target: T) -> T: ...
    @overload
    def register(self, target: str) -> Callable[[T], T]: ...

    def register(self, target: T | str) -> T | Callable[[T], T]:
        """Register a class or function; used as ``@TERMS.register`` or ``@TERMS.register("name")``.

        Raises:
            DistillError: the name is already registered for another object.
        """
        if isinstance(target, str):
            name = target

            def decorate(item: T) -> T:
                self._add(name, item)
                return item

            return decorate
        self._add(target.__name__, target)
        return target

    def _add(self, name: str, item: Callable[..., Any]) -> None:
        present = self._own.get(name)
        if present is not None and present is not item:
            self._refuse(name, item, present.__module__)
        self._own[name] = item

    def _refuse(self, name: str, item: Callable[..., Any], owner: str) -> NoReturn:
        raise DistillError(
            f"{self.kind} {name!r} is registered by {owner} already; "
            f"register {item.__module__}.{item.__qualname__} under another name"
        )

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        if self._package:
            try:
                home = import_module(self._package)
                for name in home.__all__:
                    getattr(home, name)  # the core imports its public names on first access
            except BaseException:
                self._loaded = False
                raise
        for point in entry_points(group=self.group):
            try:
                self._add(point.name, point.load())
            except (Exception, SystemExit) as error:
                self._broken[point.name] = error  # raised when this name is looked up; the other names stay usable

    def __iter__(self) -> Iterator[str]:
        self._load()
        names = dict.fromkeys((*self._own, *self._broken))
        if self.parent is not None:
            names.update(dict.fromkeys(self.parent))
        return iter(names)

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def get(self, name: str) -> Callable[..., Any]:
        """Return the class or function of this name; a :class:`DistillError` suggests similar names if there is none."""
        self._load()
        if name in self._broken:
            raise DistillError(self._cannot(name, self._broken[name])) from self._broken[name]
        if name in self._own:
            return self._own[name]
        if self.parent is not None and name in self.parent:
            return self.parent.get(name)
        raise DistillError(f"no {self.kind} is called {name!r}{nearest(name, self)}")

    def build(self, spec: Any, **defaults: Any) -> Any:
        """Build an object from ``"name"`` or ``dict(type="name", …)``; anything else, such as an instance, is returned as it is.

        Raises:
            DistillError: the name is unknown, or the class does not accept an argument.
        """
        if isinstance(spec, str):
            spec = {"type": spec}
        if not isinstance(spec, Mapping):
            return spec
        arguments = {**defaults, **spec}
        kind = arguments.pop("type", None)
        if kind is None:
            raise DistillError(f"a {self.kind} needs a 'type', one of {', '.join(self)}; got {dict(spec)}")
        target = self.get(kind) if isinstance(kind, str) else kind
        if not callable(target):
            raise DistillError(f"the type of a {self.kind} is a name or a class, got {kind!r}")
        return call(target, arguments, f"{self.kind} {getattr(target, '__name__', kind)}")

    def describe(self) -> dict[str, str]:
        """Return the first line of each name's docstring, or the reason why it cannot be loaded, without importing ``home``."""
        inherited = {} if self.parent is None else self.parent.describe()
        return dict(sorted({**inherited, **self._lines()}.items()))

    def holder(self, name: str) -> Registry | None:
        """Return the registry, this one or a parent, that holds a name of :meth:`describe`."""
        if name in self._lines():
            return self
        return None if self.parent is None else self.parent.holder(name)

    def held(self) -> dict[str, Registry]:
        """Return the registry, this one or a parent, that holds each name of :meth:`describe`."""
        inherited = {} if self.parent is None else self.parent.held()
        return {**inherited, **dict.fromkeys(self._lines(), self)}

    def needs(self, name: str) -> tuple[str, ...]:
        """Return :attr:`kdgraft.Term.needs` of a name of :meth:`describe`, without importing ``home``; empty for a function."""
        if name in self._own:
            return tuple(getattr(self._own[name], "needs", ()))
        if self.parent is None or name in written(self._package, self._variable):
            return needs_written(self._package, self._variable, name)
        return self.parent.needs(name)

    def _lines(self) -> dict[str, str]:
        """Return the part of :meth:`describe` for the names of this registry without its parent."""
        read = written(self._package, self._variable)
        points = {point.name: self._line(point, read) for point in entry_points(group=self.group)}
        return {**read, **{name: first_line(item) for name, item in self._own.items()}, **points}

    def _line(self, point: EntryPoint, read: Collection[str]) -> str:
        try:
            item = point.load()
            if point.name in self._own:
                self._add(point.name, item)
            elif point.name in read:
                self._refuse(point.name, item, self._package)
            return first_line(item)
        except (Exception, SystemExit) as error:
            return " ".join(self._cannot(point.name, error).split())

    def _cannot(self, name: str, error: BaseException) -> str:
        return f"{self.kind} {name!r} of an installed package cannot be loaded: {type(error).__name__}: {error}"


def call(target: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """Call ``target(**arguments)``; an unknown or missing argument raises a :class:`DistillError` that begins with ``what``."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # some built-in types have no signature
        raise DistillError(f"{what} cannot be built from a config") from None
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in parameters:
                raise DistillError(f"{what} takes no argument {name!r}{nearest(name, parameters)}")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise DistillError(f"{what}: {error}") from None
    try:
        return target(**arguments)
    except TypeError as error:
        # A class that passes unknown arguments on to its bases fails only there,
        # and so does one that sets an argument of its base itself.
        unknown = re.search(r"(?:unexpected keyword|multiple values for(?: keyword)?) argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in arguments or not isinstance(target, type):
            raise
        others = [name for name in arguments_of(target) if name != unknown[1]]
        raise DistillError(f"{what} takes no argument {unknown[1]!r}{nearest(unknown[1], others)}") from error


def expand_recipe(recipe: Any, recipes: Registry) -> list[Any]:
    """Return the terms of a recipe: ``"name"``, or ``dict(type="name", …)`` with settings; ``None`` stands for no terms.

    A recipe is a function that returns a list of terms, or the class of a term that is a published method by itself; the settings
    are then those of the term, with the published weight as the default.
    """
    if recipe is None:
        return []
    spec = {"type": recipe} if isinstance(recipe, str) else dict(recipe) if isinstance(recipe, Mapping) else {}
    name = spec.pop("type", None)
    if not isinstance(name, str):
        raise DistillError(f"recipe must be a name or dict(type=name, …), one of {', '.join(recipes)}")
    target = recipes.get(name)
    if isinstance(target, type):  # a term that is a whole method
        return [{"type": target.__name__, **spec}]
    return list(call(target, spec, f"recipe {name}"))


def listed(terms: Any) -> list[Any]:
    """Return the user's terms as a list, an empty one for ``None``; raise a :class:`DistillError` for what is no list."""
    if not isinstance(terms, (list, tuple, type(None))):
        raise DistillError(f"terms must be a list, got {terms!r}")
    return list(terms or ())


def check_told(terms: Any, recipe: Any, **given: Any) -> None:
    """Raise a :class:`DistillError` for arguments of a distillation, such as a teacher, without terms or a recipe.

    Args:
        terms, recipe: the user's settings; an empty list of terms counts as given, ``None`` does not.
        given: the arguments by their names.
    """
    name = next((name for name, value in given.items() if value is not None), None)
    if terms is None and recipe is None and name is not None:
        raise DistillError(
            f"{name} is given, and nothing says what to learn; name terms or a recipe, or train plainly with terms=[]"
        )


TERMS = Registry("term", "kdgraft.terms", home="kdgraft:TERMS")
LOSSES = Registry("loss", "kdgraft.losses", home="kdgraft:LOSSES")
REGIONS = Registry("region", "kdgraft.regions", home="kdgraft:REGIONS")
SCHEDULES = Registry("schedule", "kdgraft.schedules", home="kdgraft:SCHEDULES")
SOURCES = Registry("source", "kdgraft.sources", home="kdgraft:SOURCES")
RECIPES = Registry("recipe", "kdgraft.recipes", home="kdgraft:RECIPES")
