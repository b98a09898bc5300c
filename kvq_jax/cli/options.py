# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what is made of them."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from kvq_jax.base import CacheTransform, Params
    from kvq_jax.decoding.sampling import Sampling
    from kvq_jax.models import DecoderConfig

UsageError: Any = typer.BadParameter.__bases__[0]
"""A wrong call of a command. typer exports only BadParameter, which adds words of its own."""

_METHOD = "Method (those not given take the method's default: kvq methods)"
_SAMPLING = "Sampling"

Model = Annotated[
    str, typer.Option(help="smollm2 (embedded), a GGUF file, a Hugging Face folder or id.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Of weights, activations and dense tokens.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Method = Annotated[
    str, typer.Option(help="How the cache keeps keys and values: kvq methods lists them.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after this many.")]

Bits = Annotated[
    float | None,
    typer.Option(help="Of keys and values: 1 to 8, whole but for some.", rich_help_panel=_METHOD),
]
ValueBits = Annotated[
    int | None, typer.Option(help="Of values, if not --bits.", rich_help_panel=_METHOD)
]
GroupSize = Annotated[
    int | None, typer.Option(help="Tokens that share a key scale.", rich_help_panel=_METHOD)
]
ResidualLength = Annotated[
    int | None,
    typer.Option(help="Latest tokens kept in full precision.", rich_help_panel=_METHOD),
]
NumOutliers = Annotated[
    int | None,
    typer.Option(help="Outlier tokens kept in full precision.", rich_help_panel=_METHOD),
]
ParamsFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of kvq calibrate, for methods that need it.", rich_help_panel=_METHOD
    ),
]

Temperature = Annotated[
    float, typer.Option(help="0 takes the most likely token.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float | None, typer.Option(help="Keep this much probability.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(help="Keep this share of the likeliest's.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[int, typer.Option(help="Of the draws.", rich_help_panel=_SAMPLING)]


def constructors() -> dict[str, Callable[..., "CacheTransform"]]:
    """Returns the constructor of each method by its name."""
    from kvq_jax import methods
    from kvq_jax.base import CacheTransform

    # In kvq_jax.methods lower-case names are constructors, the others types; the annotation
    # tells a constructor from any helper that may come to stand beside them.
    found = {name: getattr(methods, name) for name in methods.__all__ if name.islower()}
    return {
        name: function
        for name, function in found.items()
        if inspect.isfunction(function)
        and issubclass(inspect.signature(function).return_annotation, CacheTransform)
    }


def make_methods(names: Iterable[str], **options: Any) -> dict[str, "CacheTransform"]:
    """Makes methods by name, each with those of the options that it takes.

    Args:
      names: of the methods.
      **options: keyword arguments of the constructors; None stands for one not given.

    Raises:
      UsageError: for an unknown method, an option that none of the methods takes, or
        a value that one refuses.
    """
    known = constructors()
    names = list(names)
    for name in names:
        if name not in known:
            raise UsageError(f"unknown method {name!r}: choose from {', '.join(known)}")
    takes = {name: inspect.signature(known[name]).parameters for name in names}
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("bits", 0.5) % 1 == 0:
        given["bits"] = int(given["bits"])
    for key in given:
        if not any(key in parameters for parameters in takes.values()):
            flag = "--" + key.replace("_", "-")
            verb = "does" if len(names) == 1 else "do"
            raise UsageError(f"{', '.join(names)} {verb} not take {flag}")
    try:
        return {
            name: known[name](**{k: v for k, v in given.items() if k in takes[name]})
            for name in names
        }
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_method(name: str, **options: Any) -> "CacheTransform":
    """Makes one method; see `make_methods`."""
    return make_methods([name], **options)[name]


def load_fitted(
    folder: Path | None, methods: dict[str, "CacheTransform"], config: "DecoderConfig"
) -> tuple[dict[str, "CacheTransform"], dict[str, tuple["Params", ...]]]:
    """Loads what `kvq calibrate` has fitted, for those of the methods that need it.

    Returns:
      All methods, as fitted; and the parameters of those that have some.

    Raises:
      UsageError: if one does and there is no folder.
    """
    needed = {name: method for name, method in methods.items() if method.needs_texts}
    if needed and folder is None:
        names = ",".join(needed)
        raise UsageError(
            f"{names} must be fitted first: kvq calibrate --method {names} --out DIR makes what "
            "--params DIR takes"
        )
    if not needed or folder is None:
        return methods, {}
    from kvq_jax.fitting.store import load_calibration

    fitted = {
        name: load_calibration(folder / name, method, config) for name, method in needed.items()
    }
    params = {name: calibration.params for name, calibration in fitted.items()}
    return methods | {name: calibration.method for name, calibration in fitted.items()}, params


def make_sampling(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> "Sampling":
    """Makes the sampling settings.

    Raises:
      UsageError: for a value out of range, or a filter that would have no effect.
    """
    from kvq_jax.decoding.sampling import Sampling

    filters = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    useless = [flag for flag, value in filters.items() if value is not None]
    if temperature == 0 and useless:
        raise UsageError(f"{useless[0]} has no effect without a --temperature above 0")
    try:
        return Sampling(temperature, top_k, top_p, min_p)
    except ValueError as error:
        raise UsageError(str(error)) from error
