"""How many positions a model has, and how its rotary frequencies were stretched for them."""

from __future__ import annotations

from typing import Any

# Settings that say nothing of the stretching: a model has the frequencies it was trained with.
_OF_THE_MODEL = ("type", "rope_theta", "partial_rotary_factor")
# What a config may leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {"yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True}}


def max_positions(config: Any) -> int:
    """Positions a text model has: those of its config, or as many as its rotary frequencies are
    stretched for. Where they change with the longest text of a batch (LongRoPE), those before the
    change: later rows would depend on each other.
    """
    positions = _configured(config)
    return int(min(_stretched(rope, positions) for rope in _by_kind_of_layer(config).values()))


def unscaled_positions(config: Any) -> set[int]:
    """Positions it may have had before any stretching. Checkpoints of a linear one leave them as
    they were trained, or say what the factor makes of them.
    """
    positions, before = _configured(config), set[int]()
    for rope in _by_kind_of_layer(config).values():
        before.add(rope.get("original_max_position_embeddings") or positions)
        if rope.get("rope_type") == "linear":
            before.add(int(positions / (rope.get("factor") or 1.0)))
    return before


def scaling(config: Any) -> dict[str, dict[str, Any]]:
    """What stretches the rotary frequencies, by kind of layer, in one way of writing: nothing where
    none are stretched. Their base and share of a head are not in it: models that were trained apart
    have their own.
    """
    by_kind = {}
    for kind, rope in _by_kind_of_layer(config).items():
        name = rope.get("rope_type") or "default"
        given = {k: v for k, v in rope.items() if v is not None and k not in _OF_THE_MODEL}
        if name != "default" and (name == "longrope" or given.get("factor") != 1):
            by_kind[kind] = _DEFAULTS.get(name, {}) | given
    return by_kind


def _configured(config: Any) -> int:
    given = getattr(config, "max_position_embeddings", None) or -1
    return given if given > 0 else 2**31


def _by_kind_of_layer(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary settings; those that all layers share under no name."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    return parts or {"": rope}


def _stretched(rope: dict[str, Any], positions: int) -> float:
    """How many positions rotary frequencies are for, of a config that says `positions`: checkpoints
    leave those as they were trained, or say what the factor makes of them. A linear one that names
    no original does not tell which. It is taken to leave them, and the factor multiplies them:
    Transformers' documentation asked for that when linear scaling came, and vLLM does the same.
    """
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor") or 1.0
    match rope.get("rope_type"):
        case "longrope":
            return min(positions, original or positions)
        case "yarn" | "linear":
            return max(positions, factor * (original or positions))
    return positions
