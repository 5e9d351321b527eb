"""Named parts: look one up, check its options against the constructor's signature, build it.

A registry is a plain dict `name -> class or function` in the folder that holds them. A part in a config is a flat
mapping `{name: combiner, hidden_dim: 512}`; the signature of what the name stands for is the schema of the rest.
"""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from cliplab.errors import UserError

Named = TypeVar("Named")
Registry = Mapping[str, Callable[..., Any]]


def closest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest of `known`, else the list of what there is."""
    known = sorted(known)
    by_lower = {name.lower(): name for name in known}
    near = [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)]
    if near:
        return (
            f"did you mean '{near[0]}'? There is: {', '.join(known)}"
            if len(known) <= 30
            else f"did you mean '{near[0]}'?"
        )
    return f"there is: {', '.join(known)}" if len(known) <= 30 else "no similar name is known"


def lookup(kind: str, registry: Mapping[str, Named], name: object) -> Named:
    """The class or function registered as `name`. Raises UserError with the closest match."""
    if not isinstance(name, str) or name not in registry:
        raise UserError(f"unknown {kind} '{name}': {closest(str(name), registry)}")
    return registry[name]


def check_part(kind: str, registry: Registry, part: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Raise UserError unless `part` names a registered part and all its options fit the signature.

    `given` are the parameters that the builder supplies; they are no options of the user.
    """
    part = {str(key): value for key, value in part.items()}  # YAML reads `on: 1` with the key True
    for key in part:
        if ":" in key:
            raise UserError(f"{kind}: '{key}' is no option; YAML needs a space after the colon, {{name: value}}")
    name = part.get("name")
    target = lookup(kind, registry, name)
    options = {
        key: parameter
        for key, parameter in inspect.signature(target).parameters.items()
        if key not in given and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    hints = typing.get_type_hints(target if inspect.isfunction(target) else target.__init__)
    for key, value in part.items():
        if key == "name":
            continue
        if key not in options:
            hint = closest(key, options) if options else "it has no options"
            raise UserError(f"{kind} '{name}' has no option '{key}': {hint}")
        if key in hints and not fits(value, hints[key]):
            shown = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else str(hints[key])
            raise UserError(f"{kind} '{name}': option '{key}' must be {shown}, got {value!r}")
    missing = [key for key, p in options.items() if p.default is p.empty and key not in part]
    if missing:
        raise UserError(f"{kind} '{name}' needs the option(s) {', '.join(missing)}")


def build_part(kind: str, registry: Registry, part: Mapping[str, Any], **given: Any) -> Any:
    """Check `part` and call what it names with its options and with those of `given` that it takes."""
    check_part(kind, registry, part, given=given.keys())
    target = lookup(kind, registry, part["name"])
    options = {key: value for key, value in part.items() if key != "name"}
    taken = {key: value for key, value in given.items() if key in inspect.signature(target).parameters}
    return target(**options, **taken)


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML or JSON value fits the annotation of a parameter (plain types, Literal, unions, lists, dicts)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, choice) for choice in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    return isinstance(value, origin or hint)
