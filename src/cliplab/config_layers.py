"""Layers of options over a schema of nested dataclasses: which keys there are, and how a later layer wins.

A named part (a field with the metadata PART) is a flat mapping `{name: ..., option: value}` or just its name. Naming a
part starts it afresh: options of the part that stood there before are dropped.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from cliplab.errors import UserError

PART = {"part": True}
Part = dict[str, Any]


def _sections(schema: type) -> dict[str, Any]:
    """Field name -> nested dataclass, PART, or None for a plain value."""
    found: dict[str, Any] = {}
    for item in fields(schema):
        nested = item.type if isinstance(item.type, type) and is_dataclass(item.type) else None
        found[item.name] = PART if item.metadata.get("part") else nested
    return found


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for name, nested in _sections(schema).items():
        keys.append(prefix + name)
        if nested is PART:
            keys.append(f"{prefix}{name}.name")
        elif nested:
            keys += _all_keys(nested, f"{prefix}{name}.")
    return keys


def check_keys(layer: Mapping[str, Any], schema: type, source: str) -> None:
    """Raise UserError for a key that the schema does not have, and for a plain value in place of a mapping."""
    _check(layer, schema, "", (source, _all_keys(schema)))


def _check(layer: Mapping[str, Any], schema: type, prefix: str, root: tuple[str, list[str]]) -> None:
    source, known = root
    sections = _sections(schema)
    for key, value in layer.items():
        if key not in sections:
            near = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"keys here: {', '.join(sections)}"
            raise UserError(f"{source}: unknown key '{prefix}{key}': {hint}")
        nested = sections[key]
        if nested is PART:
            optional = getattr(schema(), key) is None
            if not isinstance(value, str | dict) and not (value is None and optional):
                raise UserError(
                    f"{source}: key '{prefix}{key}' must be a name or a mapping {{name: ...}}, got {value!r}"
                )
        elif nested:
            if not isinstance(value, dict):
                raise UserError(f"{source}: key '{prefix}{key}' must be a mapping, got {value!r}")
            _check(value, nested, f"{prefix}{key}.", root)


def merge_layer(base: dict[str, Any], layer: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """`layer` over `base`; mappings are merged, parts that are named afresh are not."""
    merged = dict(base)
    sections = _sections(schema)
    for key, value in layer.items():
        nested = sections[key]
        if nested is PART:
            merged[key] = _merge_part(merged.get(key, _default_part(schema, key)), value)
        elif nested:
            merged[key] = merge_layer(merged.get(key, {}), value, nested)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merged[key] | value
        else:
            merged[key] = value
    return merged


def name_parts(layer: dict[str, Any], schema: type) -> dict[str, Any]:
    """`{composer: tirg}` -> `{composer: {name: tirg}}`."""
    named = dict(layer)
    for key, nested in _sections(schema).items():
        value = named.get(key)
        if nested is PART and isinstance(value, str):
            named[key] = {"name": value}
        elif nested is not PART and nested and isinstance(value, dict):
            named[key] = name_parts(value, nested)
    return named


def _default_part(schema: type, key: str) -> Part | None:
    return getattr(schema(), key)


def _merge_part(old: Part | None, new: str | Part | None) -> Part | None:
    if new is None or isinstance(new, str):
        return {"name": new} if new else None
    return dict(new) if "name" in new else {**(old or {}), **new}


def without_parts(layer: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """The plain values, for OmegaConf's type check; parts are checked against their constructors instead."""
    plain: dict[str, Any] = {}
    for key, value in layer.items():
        nested = _sections(schema)[key]
        if nested is not PART:
            plain[key] = without_parts(value, nested) if nested else value
    return plain


def set_parts(section: Any, layer: Mapping[str, Any]) -> None:
    """Put the parts of a layer into a config object, past OmegaConf."""
    for key, nested in _sections(type(section)).items():
        if key not in layer:
            continue
        if nested is PART:
            setattr(section, key, layer[key])
        elif nested:
            set_parts(getattr(section, key), layer[key])
