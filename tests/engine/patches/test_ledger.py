"""Patches of dummy modules: when they are made, how often, and beside other plugins' ones."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_specformer.engine.patches.ledger import Ledger, State

SOURCE = """
CONVERTERS = {}


def greet(name="you"):
    return f"hello {name}"


class Runner:
    def step(self, tokens):
        return tokens


class CPURunner(Runner):
    @staticmethod
    def stop():
        return "stopped"

    @classmethod
    def start(cls):
        return "started"

    @property
    def pace(self):
        return "slow"


class Drafter:
    def __init__(self, config, device=None):
        self.config, self.device = config, device
"""
_NAMES = (f"dummy_vllm_{number}" for number in count())


class OurDrafter:
    """Stands where our subclass is imported from; each test makes its own."""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported, and was not yet."""
    name = next(_NAMES)
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = sys.meta_path.copy()
    yield name
    sys.meta_path[:] = finders
    sys.modules.pop(name, None)


def polite(name: str, target: str = "greet") -> Ledger:
    """A plugin's ledger with one patch; each stands for a process that loads the plugin anew."""
    ledger = Ledger()

    @ledger.patch(f"{name}:{target}", why="manners", guard="none")
    def greet(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        return original(*args, **kwargs) + ", please"

    return ledger


def install(ledger: Ledger) -> None:
    ledger.apply(ledger.declared)


def state(ledger: Ledger) -> State:
    (entry,) = ledger.declared
    return ledger.state(entry)


def decorate(function: Any, word: str) -> Any:
    """What another plugin does to a function."""

    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> str:
        return f"{word} {function(*args, **kwargs)}"

    return decorated


# --- when ---


def test_applied_when_the_module_is_imported_later(name: str) -> None:
    ledger = polite(name)
    install(ledger)
    assert name not in sys.modules
    assert state(ledger) == "pending"
    module = importlib.import_module(name)
    assert module.greet("Ada") == "hello Ada, please"
    assert (state(ledger), ledger.problems()) == ("applied", [])


def test_applied_at_once_to_a_module_that_is_there(name: str) -> None:
    module = importlib.import_module(name)
    ledger = polite(name)
    install(ledger)
    assert module.greet() == "hello you, please"
    assert state(ledger) == "applied"


def test_a_module_under_way_is_patched_when_it_is_complete(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plugins may be loaded by the very module that is to be patched, halfway through it."""
    ledger = polite(name)
    monkeypatch.setattr(sys, "load_plugins", lambda: install(ledger), raising=False)
    (tmp_path / f"{name}.py").write_text(f"import sys\nsys.load_plugins()\n{SOURCE}")
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    assert ledger.problems() == []  # looks again
    assert module.greet() == "hello you, please"


def test_a_module_that_is_loaded_again_is_patched_again(name: str) -> None:
    ledger = polite(name)
    install(ledger)
    module = importlib.import_module(name)
    assert importlib.reload(module).greet() == "hello you, please"


# --- how often ---


def test_applied_once_when_plugins_load_twice(name: str) -> None:
    ledger = polite(name)
    install(ledger)
    module = importlib.import_module(name)
    install(ledger)
    install(polite(name))  # another copy of the plugin
    assert module.greet() == "hello you, please"


def test_applied_once_when_two_copies_wait_for_the_module(name: str) -> None:
    first, second = polite(name), polite(name)
    install(first)
    install(second)
    assert importlib.import_module(name).greet() == "hello you, please"
    assert state(first) == state(second) == "applied"


def test_not_again_after_somebody_has_decorated_our_patch(name: str) -> None:
    """Also when the decorator keeps nothing of what it decorates."""
    module = importlib.import_module(name)
    install(polite(name))
    patched = module.greet
    module.greet = lambda: f"well, {patched()}"
    install(polite(name))
    assert module.greet() == "well, hello you, please"


def test_a_patch_of_a_base_class_does_not_count_for_the_class(name: str) -> None:
    module = importlib.import_module(name)
    install(polite(name, "Runner.step"))
    install(polite(name, "CPURunner.step"))
    assert module.Runner().step("a") == "a, please"
    assert module.CPURunner().step("a") == "a, please, please"
    assert "step" in vars(module.CPURunner)


# --- beside other plugins ---


def test_a_function_that_somebody_has_decorated_is_patched_all_the_same(name: str) -> None:
    module = importlib.import_module(name)
    module.greet = decorate(module.greet, "well,")
    ledger = polite(name)
    install(ledger)
    assert module.greet() == "well, hello you, please"
    assert state(ledger) == "applied"


def test_two_patches_of_one_function_both_work(name: str) -> None:
    ledger = polite(name)

    @ledger.patch(f"{name}:greet", why="volume", guard="none")
    def shout(original: Callable[..., str], name: str = "you") -> str:
        return original(name).upper()

    install(ledger)
    assert importlib.import_module(name).greet(name="Ada") == "HELLO ADA, PLEASE"


class Hook(importlib.abc.MetaPathFinder):
    """Another plugin's import hook, which decorates `greet`."""

    def __init__(self, name: str, delegates: bool) -> None:
        self.name, self.delegates, self.is_busy = name, delegates, False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.name or self.is_busy:
            return None
        self.is_busy = True
        try:
            find = importlib.util.find_spec if self.delegates else self._find
            spec = find(fullname)
        finally:
            self.is_busy = False
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.greet = decorate(module.greet, "well,")

        loader.exec_module = exec_module
        return spec

    def _find(self, fullname: str) -> Any:
        return importlib.machinery.PathFinder.find_spec(fullname)


@pytest.mark.parametrize("delegates", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_two_import_hooks_both_work(name: str, delegates: bool, is_first: bool) -> None:
    ledger, hook = polite(name), Hook(name, delegates)
    install(ledger)
    sys.meta_path.insert(0 if is_first else 1, hook)
    module = importlib.import_module(name)
    if is_first and not delegates:
        # That one keeps all others from seeing the module; ours sees it at the next import.
        with pytest.raises(ImportError):
            importlib.import_module(f"{name}_and_nothing")
    assert module.greet() == "well, hello you, please"
    assert state(ledger) == "applied"


# --- what is not there ---


@pytest.mark.parametrize("target", ["wave", "Gone.step", "Runner.leap"])
def test_a_missing_symbol_is_reported_and_not_raised(name: str, target: str) -> None:
    ledger = polite(name, target)
    install(ledger)
    importlib.import_module(name)
    assert state(ledger) == "missing"
    (line,) = ledger.problems()
    assert line.startswith(f"{name}:{target}: not found in this vLLM (needed by ")
    assert line.endswith(": manners)")


def test_a_change_that_fails_stops_nobody(name: str) -> None:
    ledger = Ledger()

    @ledger.extend(f"{name}:CONVERTERS", why="a format", guard="none")
    def add(converters: Any) -> None:
        converters.register("mine")

    install(ledger)
    importlib.import_module(name)
    (line,) = ledger.problems()
    assert "has no attribute 'register'" in line
    assert state(ledger) == "missing"


def test_a_static_method_stays_one(name: str) -> None:
    install(polite(name, "CPURunner.stop"))
    runner = importlib.import_module(name).CPURunner
    assert runner().stop() == runner.stop() == "stopped, please"


def test_a_property_stays_one(name: str) -> None:
    install(polite(name, "CPURunner.pace"))
    assert importlib.import_module(name).CPURunner().pace == "slow, please"


def test_a_class_method_is_refused_rather_than_broken(name: str) -> None:
    ledger = polite(name, "CPURunner.start")
    install(ledger)
    assert importlib.import_module(name).CPURunner.start() == "started"
    assert "it is a classmethod, which `patch` does not wrap" in ledger.problems()[0]


# --- the other two kinds ---


def test_an_object_is_extended_once(name: str) -> None:
    ledger = Ledger()

    @ledger.extend(f"{name}:CONVERTERS", why="a format", guard="none")
    def add(converters: dict[str, int]) -> None:
        converters["mine"] = converters.get("mine", 0) + 1

    install(ledger)
    module = importlib.import_module(name)
    install(ledger)
    assert module.CONVERTERS == {"mine": 1}


@pytest.fixture
def drafters(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, type, Ledger]:
    """The dummy module, our subclass of its class, and a ledger that will have it built."""
    module = importlib.import_module(name)

    class Ours(module.Drafter):  # type: ignore[misc,name-defined]
        pass

    monkeypatch.setattr(sys.modules[__name__], "OurDrafter", Ours)
    ledger = Ledger()

    @ledger.construct(f"{name}:Drafter", f"{__name__}:OurDrafter", why="ours", guard="ours")
    def wanted(config: Any = None, *_: Any, **__: Any) -> bool:
        return config == "head"

    return module, Ours, ledger


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("head", "cpu"), {}),
        (("head",), {"device": "cpu"}),
        ((), {"device": "cpu", "config": "head"}),
    ],
)
def test_our_class_is_built_however_the_arguments_are_given(
    drafters: tuple[Any, type, Ledger], args: tuple[str, ...], kwargs: dict[str, str]
) -> None:
    module, ours, ledger = drafters
    install(ledger)
    install(ledger)  # the second time changes nothing
    built = module.Drafter(*args, **kwargs)
    assert type(built) is ours
    assert (built.config, built.device) == ("head", "cpu")


def test_another_of_our_classes_may_be_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    other = type("Other", (module.Drafter,), {})
    monkeypatch.setattr(sys.modules[__name__], "OurDrafter", other)
    ledger = Ledger()

    @ledger.construct(f"{name}:Drafter", "nowhere:Nothing", why="ours", guard="ours")
    def wanted(config: Any = None, *_: Any, **__: Any) -> bool | str:
        return f"{__name__}:OurDrafter" if config == "head" else False

    install(ledger)
    assert type(module.Drafter("head")) is other
    assert type(module.Drafter("eagle")) is module.Drafter


def test_other_constructions_are_as_before(drafters: tuple[Any, type, Ledger]) -> None:
    module, ours, ledger = drafters
    install(ledger)
    for other in (module.Drafter("eagle"), module.Drafter(config="eagle", device="cpu")):
        assert type(other) is module.Drafter
        assert other.config == "eagle"
    assert type(ours("eagle")) is ours

    class Theirs(module.Drafter):  # type: ignore[misc,name-defined]
        pass

    assert type(Theirs("head")) is Theirs
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
        module.Drafter()
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        module.Drafter("eagle", speed=1)


@pytest.mark.parametrize("is_first", [True, False])
def test_another_plugin_may_build_its_class_too(
    drafters: tuple[Any, type, Ledger], is_first: bool
) -> None:
    module, ours, ledger = drafters

    class Theirs(module.Drafter):  # type: ignore[misc,name-defined]
        pass

    if not is_first:
        install(ledger)
    before = module.Drafter.__new__

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        cls = Theirs if cls is module.Drafter and "theirs" in kwargs.values() else cls
        return object.__new__(cls) if is_first else before(cls, *args, **kwargs)

    module.Drafter.__new__ = staticmethod(__new__)
    install(ledger)
    assert type(module.Drafter(config="theirs")) is Theirs
    assert type(module.Drafter(config="head")) is ours
    assert type(module.Drafter("eagle")) is module.Drafter
