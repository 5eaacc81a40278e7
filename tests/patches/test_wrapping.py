import functools
import inspect
from types import ModuleType

import pytest

from vllm_moe_offload.patches.wrapping import PatchError, wrap


class Base:
    def method(self, x, *, y=1):
        """Add."""
        return x + y

    @staticmethod
    def static(x):
        return 2 * x

    @classmethod
    def of_class(cls, x):
        return cls.__name__, x

    def inherited(self):
        return "base"


@pytest.fixture
def owner() -> type:
    return type("Owner", (Base,), {n: v for n, v in vars(Base).items()
                                   if n in ("method", "static", "of_class")})  # fmt: skip


def noted(original, *args, **kwargs):
    return "noted", original(*args, **kwargs)


def test_method(owner):
    wrap(owner, "method", noted)
    assert owner().method(3, y=4) == ("noted", 7)
    assert owner.method.__doc__ == "Add."
    assert list(inspect.signature(owner.method).parameters) == ["self", "x", "y"]


def test_wrapper_gets_original_instance_and_arguments(owner):
    seen = []
    wrap(owner, "method", lambda original, *args, **kwargs: seen.append((original, args, kwargs)))
    instance = owner()
    instance.method(1, y=2)
    assert seen == [(Base.method, (instance, 1), {"y": 2})]


def test_static_method(owner):
    wrap(owner, "static", noted)
    assert owner.static(3) == owner().static(3) == ("noted", 6)
    assert isinstance(inspect.getattr_static(owner, "static"), staticmethod)


def test_function_of_a_module():
    module = ModuleType("somewhere")
    module.double = lambda x: 2 * x
    wrap(module, "double", noted)
    assert module.double(3) == ("noted", 6)
    with pytest.raises(PatchError, match="somewhere has no half in this version"):
        wrap(module, "half", noted)


def test_class_method(owner):
    wrap(owner, "of_class", noted)
    assert owner.of_class(3) == owner().of_class(3) == ("noted", ("Owner", 3))
    derived = type("Derived", (owner,), {})
    assert derived.of_class(3) == ("noted", ("Derived", 3))


@pytest.mark.parametrize("name", ["method", "static", "of_class", "inherited"])
def test_wrapping_again_changes_nothing(owner, name):
    wrap(owner, name, noted)
    once = inspect.getattr_static(owner, name)
    wrap(owner, name, noted)
    assert inspect.getattr_static(owner, name) is once


def test_not_twice_under_the_wrapper_of_somebody_else(owner):
    wrap(owner, "method", noted)
    ours = owner.method

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        return "theirs", ours(*args, **kwargs)

    owner.method = theirs
    wrap(owner, "method", noted)
    assert owner().method(1) == ("theirs", ("noted", 2))


def test_inherited_method_is_wrapped_where_it_was_asked(owner):
    wrap(owner, "inherited", noted)
    assert owner().inherited() == ("noted", "base")
    assert Base().inherited() == "base"


def test_wrapped_in_the_parent_is_enough(owner):
    wrap(owner, "inherited", noted)
    derived = type("Derived", (owner,), {})
    wrap(derived, "inherited", noted)
    assert derived().inherited() == ("noted", "base")


def test_target_that_has_moved(owner):
    with pytest.raises(PatchError) as error:
        wrap(owner, "gone", noted)
    message = str(error.value)
    assert f"{owner.__module__}.Owner has no gone" in message
    assert "Install a tested version of vLLM, or drop --plugin moe-offload" in message
    assert not hasattr(owner, "gone")
