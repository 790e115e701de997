"""What decides an update, in words that a saved state can carry, and the saved states themselves.

A state may be added to another one only if both were made by the same update. What decides that is the function that
tallies a batch and those of its options that differ from their defaults; an option that a later version adds does not
change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from xent_metrics._validate import check_has_values, describe
from xent_metrics.losses.options import BinaryOptions, LossOptions

FORMAT_VERSION = 1
"""Version of what `pack` returns; to be raised when the numbers of a state, or the default of an option, change."""

Share = list[int]
"""The rank whose state it is, and the number of ranks; `[0, 1]` for the state of all ranks together."""

Settings = dict[str, Any]
"""Names of options that differ from their defaults, and their values: numbers, strings, booleans or None."""


def changed_settings(decides: Mapping[str, Any]) -> Settings:
    """Return what of the keyword arguments of an update differs from its default.

    Args:
        decides: The keyword arguments: `options`, sizes, tensors (of which the settings have a hash), process groups
            (of which they have the size: ranks have different ones).
    """
    settings: Settings = {}
    for name, value in decides.items():
        if isinstance(value, LossOptions | BinaryOptions):
            settings |= {field: x for field, x in asdict(value).items() if x != _defaults(value)[field]}
        elif isinstance(value, Tensor):
            check_has_values(name, value)
            settings[name] = f"a tensor with hash {_hash(value.tolist())}"
        elif value is not None:
            settings[name] = value if isinstance(value, int) else value.size()
    if settings.get("backend") == "eager":
        del settings["backend"]  # Its losses have the bits of "auto".
    return {name: getattr(value, "item", lambda value=value: value)() for name, value in sorted(settings.items())}


def in_words(name: str, settings: Settings) -> str:
    """Say how something is configured, for ranks to compare and for users to read."""
    return f"{name} with {', '.join(f'{option}={value!r}' for option, value in settings.items())}"


def state_name(update: str, settings: Settings) -> str:
    """Return the name of the attribute for the state.

    A `MetricCollection` shares a state among metrics whose states have equal names and, after one batch, equal values.
    So the name holds all that decides an update, and nothing that only decides a reading.
    """
    return f"tally_{_hash((update, settings))}"


def pack(state: Tensor, update: str, settings: Settings, share: Share) -> dict[str, Any]:
    """Return what is saved of a state: plain values and a tensor."""
    # Pairs, since a distributed checkpoint reads of a dict only the keys that the loading metric has.
    pairs = [[name, value] for name, value in settings.items()]
    return {"version": FORMAT_VERSION, "update": update, "settings": pairs, "share": share, "state": state}


def unpack(
    saved: Any, update: str, decides: Mapping[str, Any], settings: Settings, own: Tensor
) -> tuple[Tensor, Share | None]:
    """Return the state of what `pack` returned, and whose it is; None if that is not known.

    Args:
        saved: What was saved.
        update: The update of the metric that loads it.
        decides: The keyword arguments of that update.
        settings: What `changed_settings` makes of them.
        own: The state that the metric has.

    Raises:
        ValueError: If it was saved by a later version, or by a metric with another update, which is then said.
    """
    if not isinstance(saved, Mapping) or not {"version", "update", "settings", "state"} <= saved.keys():
        raise ValueError(
            f"`tally` must be what a metric of xent_metrics saved, got {describe(saved)}; add a tally that you kept "
            "yourself with `metric.add`."
        )
    if saved["version"] != FORMAT_VERSION:
        raise ValueError(
            f"`tally` must have the format {FORMAT_VERSION} of a saved state, got {saved['version']}; load it with the "
            "version of xent_metrics that saved it, or a later one."
        )
    if saved["update"] != update:
        raise ValueError(
            f"`tally` must come from a metric that updates by `{update}`, got one by `{saved['update']}`; load it into "
            "the class that saved it."
        )
    theirs, defaults = dict(saved["settings"]), {}
    for value in decides.values():
        if isinstance(value, LossOptions | BinaryOptions):
            defaults = _defaults(value)
    differing = [
        f"`{name}` was {theirs.get(name, defaults.get(name))!r}, and here is {settings.get(name, defaults.get(name))!r}"
        for name in sorted(theirs.keys() | settings.keys())
        if theirs.get(name, defaults.get(name)) != settings.get(name, defaults.get(name))
    ]
    if differing:
        raise ValueError(
            f"`tally` must come from a metric with the same options, but {'; '.join(differing)}; load it into a metric "
            "that is configured as the one that saved it."
        )
    state: Tensor = saved["state"]
    if state.shape != own.shape or state.dtype != own.dtype:
        raise ValueError(f"`tally` must hold a state like {describe(own)}, got {describe(state)}; it was damaged.")
    return state, saved.get("share")


def part_of_rank(state: Tensor, share: Share | None, place: Share) -> Tensor:
    """Return what a rank keeps of a saved state, so that all ranks together keep it once.

    Args:
        state: The state.
        share: Whose it is. That of all ranks together goes to the first one.
        place: The rank that loads it, and of how many.

    Raises:
        ValueError: If it is the state of another rank, or among several ranks if it does not say whose it is. One of
            no targets is anybody's.
    """
    if share == [0, 1]:
        return state if place[0] == 0 else torch.zeros_like(state)
    is_alone = share is None and place == [0, 1]
    if share == place or is_alone or not state.any():
        return state
    whose = "does not say of which rank it is" if share is None else f"is of rank {share[0]} of {share[1]} alone"
    raise ValueError(
        f"`tally` must be of all ranks, or of the rank that loads it, {place[0]} of {place[1]}, but this one {whose}; "
        "save the state_dict within `metric.sync_context()`, or pass those of all ranks to `metric.merge_state`."
    )


def name_before_0_1_0(update: str, decides: Mapping[str, Any], own: Tensor) -> str:
    """Return the key under which a version before 0.1.0 saved the state of a metric with this update."""
    options = decides["options"]
    names = "input class_dim label_smoothing ignore_index eps label_smoothing_over shift backend"
    if isinstance(options, BinaryOptions):
        names = "input label_smoothing ignore_index eps backend"
    values = {name: getattr(options, name) for name in names.split()}
    if options.backend == "eager":
        values["backend"] = "auto"
    listed = f"{type(options).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    tensors = {name: value.tolist() for name, value in decides.items() if isinstance(value, Tensor)}
    group = decides.get("sequence_group")
    num_ranks = None if group is None else group.size()
    configuration = f"({update!r}, {listed}, {tuple(own.shape)!r}, {tensors!r}, {num_ranks!r})"
    return f"tally_{blake2b(configuration.encode(), digest_size=8).hexdigest()}"


def _defaults(options: LossOptions | BinaryOptions) -> dict[str, Any]:
    return {field.name: field.default for field in fields(options)}


def _hash(value: Any) -> str:
    return blake2b(repr(value).encode(), digest_size=8).hexdigest()
