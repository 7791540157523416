"""How a change of vLLM is declared, when it is made, and what became of it.

A file of this folder declares each of its changes with one of three decorators, and the declaration
is all there is to write:

- `patch`: our function takes the place of a function or method and gets the original first;
- `construct`: a class builds our subclass where our function says so;
- `extend`: our function adds something to an object, such as a registry.

A change is made right after vLLM has imported the module, or at once where it has. It is made once,
however often plugins are loaded: we mark the module or class, not the function, so what other
plugins have done or do to the function makes no difference. Nothing here raises into vLLM's
imports: what could not be changed is kept in `problems` and refused where SpecFormer is chosen.

Nothing of vLLM or torch is imported here, nor by the files that declare: `specformer doctor` and
the table of symbols read the declarations.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, TypeVar

# The files of this folder that declare changes.
SUBJECTS = (
    "registration",
    "command_line",
    "drafters",
    "cpu_sampling",
    "cpu_synthetic",
    "carried_drafts",
    "draftless_steps",
    "late_store",
    "requests",
    "new_requests",
    "kv_groups",
    "candidates",
    "threshold",
    "extraction",
    "worker",
)
# They act only where somebody asks for SpecFormer. Made on every vLLM, so that one which is not
# supported can be refused by name.
ON_ANY_VERSION = ("registration", "command_line")

# Our names in the order in which they were applied, on the module or class that was changed.
_MARK = "__specformer_patches__"

Kind = Literal["function", "class", "value", "import", "attribute"]
State = Literal["applied", "pending", "missing", "off"]
_F = TypeVar("_F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patch:
    """One change of vLLM.

    `target` is "module:Qualified.name", `name` our function's; `kind`, `parameters` and `bases` are
    what the target's source must show. `passes_on`: our function hands further arguments on, so new
    parameters do no harm. `later` is where a later vLLM keeps the target. `change` gets what stands
    at the target and returns what is to.
    """

    target: str
    why: str
    guard: str
    name: str
    kind: Kind
    change: Callable[[Any], Any] = field(repr=False, compare=False)
    parameters: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    passes_on: bool = False
    later: str = ""

    @property
    def places(self) -> dict[str, str]:
        """Qualified name of the target by the module that may hold it."""
        targets = filter(None, (self.target, self.later))
        return {module: name for module, _, name in (t.partition(":") for t in targets)}

    @property
    def file(self) -> str:
        """Our file that declares it, as "engine/patches/requests.py"."""
        return "/".join(self.name.split(".")[1:-1]) + ".py"

    @property
    def subject(self) -> str:
        return self.name.split(".")[-2]

    def place(self, module: ModuleType) -> tuple[Any, str]:
        """The module or class that holds the target, and the attribute."""
        *owners, attribute = self.places[module.__name__].split(".")
        return functools.reduce(getattr, owners, module), attribute


class Ledger(importlib.abc.MetaPathFinder):
    """All changes that were declared, and the import hook that makes them."""

    def __init__(self) -> None:
        self.declared: list[Patch] = []
        self._active: dict[str, list[Patch]] = {}  # module -> what is to be changed in it
        self._waiting: set[str] = set()  # modules of `_active` that were not seen yet
        self._problems: dict[str, str] = {}  # name -> why it could not be changed
        self._absent: dict[str, set[str]] = {}  # name -> modules that do not hold the target
        self._lock = threading.RLock()

    # --- declaring ---

    def patch(
        self,
        target: str,
        *,
        why: str,
        guard: str,
        parameters: str | None = None,
        imported: bool = False,
        attribute: bool = False,
        later: str = "",
    ) -> Callable[[_F], _F]:
        """Let the decorated function take the target's place: `ours(original, *arguments)`.

        Args:
            target: a function, method or property, "module:name" or "module:Class.name".
            why: what goes wrong, or is impossible, without it.
            guard: what keeps it from acting elsewhere.
            parameters: names the target must take, separated by blanks. By default those that our
                function takes after `original` (and `self`).
            imported: the target's module has it from another one; there, parameters are not looked
                at.
            attribute: the target is a property.
            later: the target's place in a later vLLM that we support.
        """

        def declare(ours: _F) -> _F:
            def change(original: Any) -> Any:
                @functools.wraps(original)
                def patched(*args: Any, **kwargs: Any) -> Any:
                    return ours(original, *args, **kwargs)

                return patched

            own, passes_on = _signature(ours, 2 if "." in target.partition(":")[2] else 1)
            names = own if parameters is None else tuple(parameters.split())
            kind: Kind = "import" if imported else "attribute" if attribute else "function"
            names = () if kind != "function" else names
            self._declare(ours, target, why, guard, kind, change, names, (), passes_on, later)
            return ours

        return declare

    def construct(
        self, target: str, ours: str, *, why: str, guard: str, bases: tuple[str, ...] = ()
    ) -> Callable[[_F], _F]:
        """Let a class build `ours` where the decorated function is true of the arguments.

        The function may name another of our subclasses instead, "module:Class".

        Args:
            target: the class, "module:Class".
            ours: our subclass, "module:Class"; imported when it is built.
            why, guard: as for `patch`.
            bases: what the target must derive from.
        """

        def declare(wanted: _F) -> _F:
            def change(base: Any) -> Any:
                own = base.__new__ if "__new__" in vars(base) else None

                def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
                    found = cls is base and wanted(*args, **kwargs)
                    if found:
                        chosen = found if isinstance(found, str) else ours
                        module, _, name = chosen.partition(":")
                        cls = getattr(import_module(module), name)
                    build = own or super(base, cls).__new__
                    return build(cls) if build is object.__new__ else build(cls, *args, **kwargs)

                base.__new__ = staticmethod(__new__)
                return base

            self._declare(wanted, target, why, guard, "class", change, bases=bases)
            return wanted

        return declare

    def extend(self, target: str, *, why: str, guard: str) -> Callable[[_F], _F]:
        """Hand the object at `target`, "module:name", to the decorated function, to add to it."""

        def declare(add: _F) -> _F:
            def change(value: Any) -> Any:
                add(value)
                return value

            self._declare(add, target, why, guard, "value", change)
            return add

        return declare

    def _declare(
        self,
        ours: Callable[..., Any],
        target: str,
        why: str,
        guard: str,
        kind: Kind,
        change: Callable[[Any], Any],
        parameters: tuple[str, ...] = (),
        bases: tuple[str, ...] = (),
        passes_on: bool = False,
        later: str = "",
    ) -> None:
        name = f"{ours.__module__}.{ours.__qualname__}"
        self.declared.append(
            Patch(target, why, guard, name, kind, change, parameters, bases, passes_on, later)
        )

    # --- applying ---

    def apply(self, entries: Iterable[Patch]) -> None:
        """Make these changes, now or when vLLM imports their modules; safe to call again."""
        for entry in entries:
            for module in entry.places:
                active = self._active.setdefault(module, [])
                if entry not in active:
                    active.append(entry)
                    self._waiting.add(module)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._change_loaded()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Another plugin's finder may stand before this one and have loaded a module past it.
        self._change_loaded()
        if fullname not in self._active:
            return None
        spec = self._next_spec(fullname, path, target)
        loader: Any = spec.loader if spec is not None else None
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            vars(module).pop(_MARK, None)  # of a module that is loaded again
            execute(module)
            self._change(module)

        loader.exec_module = exec_module
        return spec

    def _next_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        """What the finders behind this one say, so that other plugins' hooks take part."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None

    def _change_loaded(self) -> None:
        for name in tuple(self._waiting):
            module = sys.modules.get(name)
            # A module that is being imported does not have all its names yet.
            is_complete = not getattr(getattr(module, "__spec__", None), "_initializing", False)
            if module is not None and is_complete:
                self._change(module)

    def _change(self, module: ModuleType) -> None:
        with self._lock:
            self._waiting.discard(module.__name__)
            for entry in self._active[module.__name__]:
                self._problems.pop(entry.name, None)
                try:
                    _make(entry, module)
                except _NotThereError as error:
                    absent = self._absent.setdefault(entry.name, set())
                    absent.add(module.__name__)
                    if absent >= entry.places.keys():
                        self._fail(entry, str(error))
                except Exception as error:  # vLLM must start where nobody asks for SpecFormer
                    self._fail(entry, repr(error))

    def _fail(self, entry: Patch, problem: str) -> None:
        self._problems[entry.name] = problem
        logger.info("%s was not changed: %s", entry.target, problem)

    # --- reporting ---

    def state(self, entry: Patch) -> State:
        """Whether the change is made in this process, will be, or cannot be."""
        if entry.name in self._problems:
            return "missing"
        loaded = [sys.modules[name] for name in entry.places if name in sys.modules]
        return "applied" if any(_is_made(entry, module) for module in loaded) else "pending"

    def problems(self) -> list[str]:
        """Changes that could not be made in this process so far, one line each."""
        self._change_loaded()
        return [
            f"{entry.target}: {self._problems[entry.name]} (needed by {entry.file}: {entry.why})"
            for entry in self.declared
            if entry.name in self._problems
        ]


class _NotThereError(LookupError):
    """This vLLM has no such symbol."""


def _make(entry: Patch, module: ModuleType) -> None:
    try:
        owner, name = entry.place(module)
        found = inspect.getattr_static(owner, name)
    except AttributeError:
        raise _NotThereError("not found in this vLLM") from None
    if entry.name in _marks(owner):
        return
    if isinstance(found, classmethod):
        raise TypeError("it is a classmethod, which `patch` does not wrap")
    changed: Any
    if isinstance(found, property):
        changed = property(entry.change(found.fget), found.fset, found.fdel, found.__doc__)
    else:
        changed = entry.change(getattr(owner, name))
    setattr(owner, name, staticmethod(changed) if isinstance(found, staticmethod) else changed)
    setattr(owner, _MARK, (*_marks(owner), entry.name))


def _is_made(entry: Patch, module: ModuleType) -> bool:
    try:
        return entry.name in _marks(entry.place(module)[0])
    except AttributeError:
        return False


def _marks(owner: Any) -> tuple[str, ...]:
    """Our changes of a module or class, not counting those of the classes it derives from."""
    return vars(owner).get(_MARK, ())


def _signature(ours: Callable[..., Any], skipped: int) -> tuple[tuple[str, ...], bool]:
    """Names that a function takes after the first few, and whether it takes any others."""
    parameters = list(inspect.signature(ours).parameters.values())[skipped:]
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = tuple(p.name for p in parameters if p.kind not in catch_all)
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


LEDGER = Ledger()
patch, construct, extend = LEDGER.patch, LEDGER.construct, LEDGER.extend


def declared() -> tuple[Patch, ...]:
    """Every change of vLLM, file by file in the order of SUBJECTS."""
    for subject in SUBJECTS:
        import_module(f"{__package__}.{subject}")
    return tuple(sorted(LEDGER.declared, key=lambda entry: SUBJECTS.index(entry.subject)))


def apply(subjects: Sequence[str] = SUBJECTS) -> None:
    """Make the changes of these files; safe to call again."""
    LEDGER.apply(entry for entry in declared() if entry.subject in subjects)


def rows(subjects: Sequence[str] = SUBJECTS) -> list[dict[str, str]]:
    """The ledger as `specformer doctor` prints it: target, reason, guard, state in this process.

    Changes of other files than `subjects` are "off".
    """
    return [
        {
            "target": entry.target,
            "reason": entry.why,
            "guard": entry.guard,
            "state": LEDGER.state(entry) if entry.subject in subjects else "off",
        }
        for entry in declared()
    ]
