"""multipleOf, exactly: 0.29 is a multiple of 0.01, though the division of their 64-bit floats leaves a rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from pipeline.answers.typed import LARGEST_INT

# How many times the step a number is at least, or at most; by how many times it the bound is.
LEAST: dict[str, Callable[[Fraction], int]] = {
    "minimum": math.ceil, "exclusiveMinimum": lambda times: math.floor(times) + 1,
}  # fmt: skip
MOST: dict[str, Callable[[Fraction], int]] = {
    "maximum": math.floor, "exclusiveMaximum": lambda times: math.ceil(times) - 1,
}  # fmt: skip
BOUNDS = (*LEAST, *MOST)


def checked(validator: Any, factor: float, instance: Any, schema: Any) -> Iterator[Any]:
    """The keyword multipleOf for a validator of jsonschema: floats are the decimals that they are written as.

    A float is a multiple if it is the 64-bit float of one; infinity is left to others.
    """
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(instance, "number") or abs(instance) == math.inf:
        return
    step = _written(factor)
    nearest = round(Fraction(instance) / step) * step
    if instance != (float(nearest) if isinstance(instance, float) else nearest):
        yield ValidationError(f"{instance!r} is not a multiple of {factor!r}")


def narrow(schema: dict[str, Any]) -> None:
    """Let the bounds of a number with multipleOf be multiples, and name the numbers where one or two are left.

    The same numbers fit. llguidance finds none between 0.285 and 0.295 by 0.01, since it writes as many decimals as
    bounds have, and none from 0.29 to 0.29, since it divides floats. Where no number fits, it says so itself.
    """
    if "multipleOf" not in schema or {"enum", "const"} & set(schema):
        return
    if any(isinstance(schema.get(key), bool) for key in BOUNDS):
        return  # draft 4 has exclusiveMinimum: true
    kinds = {schema["type"]} if isinstance(schema.get("type"), str) else set(schema.get("type", ()))
    whole = "integer" in kinds and "number" not in kinds
    step = _written(schema["multipleOf"])
    if whole:
        step = Fraction(step.numerator)  # the whole numbers among the multiples
    least = [times(_written(schema[key]) / step) for key, times in LEAST.items() if key in schema]
    most = [times(_written(schema[key]) / step) for key, times in MOST.items() if key in schema]
    if least and most and max(least) > min(most):
        return
    if any(abs(times * step) > LARGEST_INT for times in least + most):
        return  # digits without end
    few = least and most and min(most) - max(least) < 2
    changed: dict[str, Any] = {"multipleOf": _number(step)}
    if few and kinds and kinds <= {"integer", "number", "null"}:
        found = [times * step for times in range(max(least), min(most) + 1)]
        named = [int(each) if whole else float(each) for each in found]
        changed = {"enum": [*named, None] if "null" in kinds else named}
    else:
        changed |= {"minimum": _number(max(least) * step)} if least else {}
        changed |= {"maximum": _number(min(most) * step)} if most else {}
    for key in ("multipleOf", *BOUNDS):
        schema.pop(key, None)
    schema.update(changed)


def _written(number: float) -> Fraction:
    """The number that a float is written as."""
    return Fraction(repr(number))


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
